// Package incluster tries Mantlet where it is to work: on a Kubernetes cluster of two nodes that is made for it (test/cluster), installed by
// `mantlet install` from an image of what is in this tree, with traffic between real pods.
//
//	Up ──► build: mantlet, agent, image ──► cluster ──► mantlet install | kubectl apply ──► World
//
// The tests share one World. `go test` runs what fits into a CI run (see TestMain); MANTLET_CLUSTER=all runs everything (`make test-cluster`).
//
// MANTLET_CLUSTER_CAPTURE says in which mode Mantlet is installed: sidecar, also where it is not set, or node (`make test-cluster CAPTURE=node`; without CAPTURE
// one after the other). All tests hold in both modes. What node mode has beside, a daemon and a CNI plugin on each node, tests of its own try; in sidecar mode
// these say that they were left out. Where modes differ by design the tests want what is right in each:
//
//	                                  sidecar                      node
//	a namespace at level baseline     the pod is refused           it starts; its sidecar needs nothing
//	hostUsers: false                  enforced                     the pod is refused: the daemon could not tell its sidecar
//
// cmd/speed measures on a World what docs/kubernetes-speed.md says.
package incluster
