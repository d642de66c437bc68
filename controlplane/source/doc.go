// Package source says where the objects come from that decide: here, from manifests; they come out as the complete Kubernetes
// objects of a small cluster, as a control plane would have seen them after everything had started.
//
//	files, folders, stdin ──files.go──► texts ──documents.go──► documents, items of Lists ──kinds.go──► typed, checked objects
//	      Deployments, Jobs, … ──workloads.go──► pods ──addresses.go──► with addresses ──pods.go──► running, with sidecar or without
//	      Services ──addresses.go──► with cluster IPs ──endpoints.go──► EndpointSlices ──nodes.go──► with nodes, zones, hints
//
// Manifests are what GitOps repositories and exports (`kubectl get -o yaml`) hold. An export may have both the workloads and their
// pods: pods that exist are taken as they are, and only workloads that have none get pods made.
//
// The same input gives the same output, byte for byte, whatever the order of files: names, addresses and hashes that a cluster
// would draw at random are computed. Everything that is wrong is reported at once, as [Problems]; nothing that decides is skipped
// silently: what is not read is counted in [Manifests.Ignored], and what deserves a thought is in [Manifests.Warnings].
package source
