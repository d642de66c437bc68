// Package inject gives pods their sidecar, or says why it will not.
//
//	pod, its namespace, Config ──► Inject ──► the pod with its sidecar, and the same as a JSON patch
//	                                     ├──► unchanged: nobody asked for a sidecar, or no policy applies to the pod
//	                                     └──► *Refusal: the sidecar would enforce nothing, or could not run
//
// [Inject] is a pure function, and idempotent: what it made it leaves as it is. It never touches app containers. The webhook (package
// webhook) and `mantlet inject` are thin layers around it.
//
// # The sidecar
//
// It is a native sidecar (an init container that restarts always), the first of the init containers: those that follow, and the app, start
// once its postStart hook has passed (with node capture its startup probe), which it does when the redirect is in place and the first policy was
// confirmed. A Job's pod ends with its app containers.
//
// Probes of app containers are left as they are. The kubelet reaches a pod from the pod's own node, and the sidecar lets the own node
// through to every port but the two capture ports.
//
// # What it may do
//
// Capturing in the sidecar takes these capabilities, and all others are dropped:
//
//	NET_ADMIN     write nftables, read the SYN hold's NFLOG group, mark sockets, close revoked connections (SOCK_DESTROY)
//	NET_RAW       send a held SYN once more, by a raw socket
//	SETUID,SETGID start Envoy as a user of its own, without any capability; keep the capture ports for that user
//	KILL          end an Envoy that is of another user
//	CHOWN         give Envoy its folder, and its group the way to the agent's socket
//	DAC_OVERRIDE  write Envoy's bootstrap into that folder, and speak to the admin socket there
//	FOWNER        set that folder's mode again after the sidecar was restarted
//
// With node capture it has none and is not root.
//
// # What is refused
//
// What defeats enforcement: see rules.go and hostpath.go, with the reason for each. A namespace may allow most of it by names.AllowAnnotation.
//
// A pod may opt out by the annotation policy.InjectLabel "false", unless its namespace's label of that name is names.InjectRequired. Pods of the
// node's network, static ones and those for Windows have no sidecar in such a namespace either: no NetworkPolicy applies to them, and who may
// run them is Pod Security's to say.
//
// What cannot be seen in a pod: a container that runs as root with the capabilities that container runtimes give by default has NET_RAW, with
// which Linux since 5.17 lets it set the proxy's mark, and SETUID, with which it becomes the proxy's user; either takes it past its own
// sidecar. One that is not root comes to the same by a setuid file of root's, unless it says allowPrivilegeEscalation: false. Inject warns of both. Whether an
// image has such a file is not seen. The destination's sidecar refuses such a connection all the same where it is strict, since it has no identity.
//
// Nor is it seen as whom an image says that it runs. As the proxy's user it cannot, for that is drawn for each pod: package proxyuser says against whom that
// helps and against whom it does not. A container whose spec says runAsUser is that user whatever its image says, and Inject refuses those that sidecars are.
package inject
