// Package kube brings the objects that decide from a Kubernetes API server.
//
//	watch ──► shared informers ──slim──► handlers ──► queue: the latest state of each object
//	                                                    │ one goroutine: Run
//	                                                    ▼
//	                                                  world: pods with all addresses of their node; the cluster's ranges
//	                                                    │
//	                         first, when all is there: Start(Networks, Objects)
//	                                           then: Target.Update(applied, deleted), Target.Renumber
//
// Nothing is said before every informer has its first whole list: half a set of policies would be wrong policy. From then on the first
// change goes out at once; what comes while it is taken over waits, only the last state of each object, and goes out as one.
//
// # What gets lost
//
// Nothing. An informer that loses its watch goes on where it was, or lists anew and tells what is different by comparison with what it had; so
// what happens while the API server is away arrives when it is back. An object that was deleted and created again meanwhile arrives
// as the new one: whoever takes it over has to look at the UID.
//
// # What is told apart here
//
// A pod has a sidecar if it has the native sidecar container that injection adds (names.Container of inject), whatever its annotations say.
// Pods that have finished are not watched: their addresses are free. Those on the node's network are left to policy, which leaves them out.
//
// The own node of a pod may always reach it (kubelet's probes), and does so from its InternalIPs, or, where a bridge connects its pods, from
// the first address of the node's ranges, which CNI's host-local allocator gives to the bridge. An address that a pod has is
// never taken for a node's, for there are allocators that give that one to pods.
package kube
