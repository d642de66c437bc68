// Package envoy runs a pod's Envoy: it writes the bootstrap, starts the process with as little privilege as it can do with,
// starts it again when it dies, and drains it at the end.
//
//	Bootstrap ──► bootstrap.json ──► envoy -c          ┌─ died ──► logged, started again after a pause
//	                                   │               │
//	                 agent.sock ◄──────┤  Process.Run ─┤
//	            (ADS, SDS, logs)       │               │
//	                 admin.sock ───────┘               └─ context ended ──► stops accepting ──► open connections
//	                                                                        end or time is up ──► SIGTERM ──► SIGKILL
//
// Whenever Envoy is away, the pod's redirect leads nowhere and connections are refused; nothing here has to see to that.
//
// # Privilege
//
// Envoy gets an empty environment, cannot gain privileges (no_new_privs) and dies with the agent, even if that is killed.
//
// [OwnUser]: it runs as a user that the agent has chosen for this pod, without any capability. The redirect lets that user's connections pass.
//
// [SharedUser]: where a user namespace maps one user only, there is no other user to be. Envoy then runs as the agent's user, with
// its bounding set cut down to the one capability that lets it mark its connections (CAP_NET_RAW; before Linux 5.17
// CAP_NET_ADMIN), and its bootstrap marks them.
package envoy
