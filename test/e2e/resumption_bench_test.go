package e2e

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"testing"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/xds"
)

// BenchmarkResumption opens connections between two sidecars, one after the other, each for one line and its answer; with resumed TLS
// sessions and without, in one run, because only the ratio says anything.
//
//	go test ./test/e2e -run '^$' -bench Resumption -benchtime 2000x
func BenchmarkResumption(b *testing.B) {
	for _, r := range []xds.Resumption{xds.Resume, xds.NeverResume} {
		b.Run(r.String(), func(b *testing.B) {
			m := manifests(b, aging)
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			s, err := sandbox.Start(ctx, sandbox.Config{
				Manifests: m, Policy: policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork}, Binaries: binaries(b),
				Lifetimes: sandbox.Lifetimes{Resumption: r}, Log: slog.New(slog.DiscardHandler),
			})
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := s.Close(); err != nil {
					b.Error(err)
				}
			}()
			api, _ := s.Pod("shop/api-a")
			db, _ := s.Pod("shop/db")
			to := netip.AddrPortFrom(db.Spec().IPs[0], echo)
			b.ResetTimer()
			if err := api.Do(func() error {
				for i := range b.N {
					if err := oneLine(b.Context(), to, i); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
		})
	}
}

// oneLine connects from the namespace that it runs in.
func oneLine(ctx context.Context, to netip.AddrPort, i int) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return fmt.Errorf("connection %d: %w", i, err)
	}
	defer conn.Close()
	return ask(conn, bufio.NewReader(conn), i)
}
