// Package apitest gives tests an API server of their own (test/cluster).
package apitest

import (
	"testing"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mantlet/mantlet/test/cluster"
)

// Start starts an API server that lasts as long as the test.
func Start(t testing.TB, o cluster.APIServerOptions) *cluster.APIServer {
	t.Helper()
	s, err := cluster.StartAPIServer(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// Config is how an administrator reaches it, with the limit of requests that client-go has by itself.
func Config(t testing.TB, s *cluster.APIServer) *rest.Config {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", s.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// Client is an administrator's, without a limit of requests: tests do not wait for themselves.
func Client(t testing.TB, s *cluster.APIServer) kubernetes.Interface {
	t.Helper()
	config := Config(t, s)
	config.QPS = -1
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
