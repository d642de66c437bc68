// Package incluster tries Mantlet where it is to work: on a Kubernetes cluster of two nodes that is made for it (test/cluster), installed by
// `mantlet install` from an image of what is in this tree, with traffic between real pods.
//
//	Up ──► build: mantlet, agent, image ──► cluster ──► mantlet install | kubectl apply ──► World
//
// The tests share one World. `go test` runs what fits into a CI run (see TestMain); MANTLET_CLUSTER=all runs everything (`make test-cluster`).
// cmd/speed measures on a World what docs/kubernetes-speed.md says.
package incluster
