// Package policy turns Kubernetes objects into verdicts. It is pure: no I/O, no Envoy, no clients, no clock.
//
//	objects ──Index.Apply──► which subjects are affected ──Index.Verdicts──► verdict.Verdicts of each
//	                                                     └─Index.Answer───► one connection, decided and explained
//	                                                     └─Index.Destination► what an address stands for
//
// The [Index] holds what decides: pods grouped into identities and subjects, namespaces, policies, services. A subject is a set of
// pods for which every verdict is the same: one identity, and the same of everything else that the compiler reads of a pod (its
// named ports, the values of volatile labels that some selector mentions, the side of each ipBlock boundary its addresses lie on).
// Replicas are one subject; scaling changes no verdict.
//
// # Semantics
//
// The specification is the text of networking.k8s.io/v1 NetworkPolicy. Where it leaves room:
//
//   - A selector becomes a match in one of two ways. If it mentions no volatile label it covers all pods of an identity or none:
//     the identity alone decides. If it mentions one, identity and address decide together.
//   - ipBlocks match by address, also the addresses of pods. Selectors never match host-network pods.
//   - At a subject that ingress policy isolates, a known peer's own egress policy is part of the verdict.
//   - Peers without identity: a permissive subject knows pods without a sidecar by their address; everything else inside the pod
//     network is refused at an isolated subject, because it can only be a pod that slips past its sidecar or is unknown. A strict
//     subject accepts only addresses outside the pod network, and only those that an ipBlock names.
//   - A named port means what the destination pod calls so (containers, and init containers that restart always). Outside of pods
//     it means nothing.
//
// # Invalid policy
//
// [Validate] says what the API server would refuse. Should such a policy reach the Index all the same, it isolates what it
// selects (everything in its namespace where the selector itself is broken), its broken rules admit nothing, and
// [Index.Problems] names it.
package policy
