package kube

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// lines sends each line that is logged to a channel.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	l <- string(b)
	return len(b), nil
}

// TestOlderAPIServer: one before 1.33 has no ServiceCIDRs. With Networks.Services nobody asks for them; without, nothing starts, and the log says why.
func TestOlderAPIServer(t *testing.T) {
	for name, services := range map[string][]netip.Prefix{"named": {netip.MustParsePrefix("10.96.0.0/16")}, "not named": nil} {
		t.Run(name, func(t *testing.T) {
			client := fake.NewClientset()
			absent := apierrors.NewNotFound(schema.GroupResource{Group: "networking.k8s.io", Resource: "servicecidrs"}, "")
			client.PrependReactor("list", "servicecidrs", func(clienttesting.Action) (bool, runtime.Object, error) { return true, nil, absent })
			client.PrependWatchReactor("servicecidrs", func(clienttesting.Action) (bool, watch.Interface, error) { return true, nil, absent })
			log := make(lines, 100)
			source := New(Config{Client: client, Log: slog.New(slog.NewTextHandler(log, nil)), Networks: Networks{Services: services}})
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			started, ended := make(chan Networks, 1), make(chan error, 1)
			enough := errors.New("it has started")
			go func() {
				ended <- source.Run(ctx, func(n Networks, _ *policy.Objects) (Target, error) {
					started <- n
					return nil, enough
				})
			}()
			if services != nil {
				if n := <-started; !n.Equal(Networks{Services: services}) || !errors.Is(<-ended, enough) {
					t.Errorf("it starts with %+v", n)
				}
				return
			}
			for complaints := 0; complaints < 2; { // it goes on asking
				select {
				case line := <-log:
					if strings.Contains(line, "level=WARN") && strings.Contains(line, "resource=servicecidrs") {
						complaints++
					}
				case n := <-started:
					t.Fatalf("it starts with %+v", n)
				}
			}
			stop()
			if err := <-ended; err != nil || len(started) > 0 {
				t.Errorf("it ended with %v, and has started %d times", err, len(started))
			}
		})
	}
}
