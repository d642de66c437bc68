// Package cluster is real Kubernetes on one machine, for tests and for trying things out.
//
// [StartAPIServer] is etcd and a kube-apiserver on loopback: what informers, TokenReview and admission webhooks are tested with. It needs no
// privilege.
//
// [Up] is a whole cluster with nodes that run pods. It needs root, and Linux alone.
package cluster
