package agent

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// The agent's verdicts come beside what Envoy gets: confirmed, refused and confirmed again, and no Envoy ever hears of them.
func TestVerdicts(t *testing.T) {
	w := newWorld(t)
	w.startPlane()
	w.startAgent()
	w.ready()
	const pod = server.Client("shop/db")
	ledger := w.cp.Server().Ledger()
	verdicts := func() server.ResourceStatus {
		t.Helper()
		st, ok := ledger.Status(pod)
		if !ok {
			t.Fatal("the ledger does not know the pod")
		}
		for _, r := range st.Resources {
			if r.Type == names.TypeVerdicts && r.Name == names.Verdicts {
				return r
			}
		}
		t.Fatalf("no verdicts in %+v", st.Resources)
		return server.ResourceStatus{}
	}
	if err := ledger.Wait(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	first := verdicts()
	if !first.InForce || first.Acked == "" {
		t.Fatalf("ready, with verdicts %+v", first)
	}
	if err := w.cp.Apply(objects(8080, 8082).NetworkPolicies[0]); err != nil {
		t.Fatal(err)
	}
	if err := ledger.Wait(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	second := verdicts()
	if !second.InForce || second.Acked == first.Acked {
		t.Fatalf("after a change: %+v, then %+v", first, second)
	}

	r, err := server.NewResource(names.Verdicts, &mantletv1.Verdicts{Subject: "spiffe://td.example/x"})
	if err != nil {
		t.Fatal(err)
	}
	packets, err := server.NewResource(names.Packets, &mantletv1.Packets{})
	if err != nil {
		t.Fatal(err)
	}
	network, err := server.NewResource(names.Network, wire.NetworkMessage(&verdict.Network{Cluster: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")}}))
	if err != nil {
		t.Fatal(err)
	}
	unreadable, err := server.NewSet(r, packets, network)
	if err != nil {
		t.Fatal(err)
	}
	w.cp.Server().Publish(pod, unreadable)
	var refused *server.RefusedError
	if err := ledger.Wait(t.Context(), pod); !errors.As(err, &refused) || refused.Type != names.TypeVerdicts || !strings.Contains(refused.Refusal.Reason, "mode 0 is not known") {
		t.Fatalf("verdicts that cannot be read: %v", err)
	}
	if is := verdicts(); is.Acked != second.Acked {
		t.Errorf("refused, and the one before is not held any more: %+v", is)
	}

	if err := w.cp.Apply(objects(8080).NetworkPolicies[0]); err != nil {
		t.Fatal(err)
	}
	if err := ledger.Wait(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	if is := verdicts(); !is.InForce || is.Acked != first.Acked {
		t.Errorf("the first policy again: %+v, was %+v", is, first)
	}
	w.ready()

	// A control plane that comes back is told what is held, and sends it to nobody again.
	w.stopPlane()
	w.startPlane()
	ledger = w.cp.Server().Ledger()
	if err := ledger.Wait(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
	if is := verdicts(); !is.InForce || is.Acked != first.Acked {
		t.Errorf("at the next control plane: %+v, was %+v", is, first)
	}
	if n := ledger.Totals()[names.TypeVerdicts]; n.Resources != 0 {
		t.Errorf("sent again: %+v", n)
	}
	w.ready()
	w.stopAgent()
	if text, _ := w.log.read(); strings.Contains(text, "relay: envoy refused") {
		t.Error("envoy was sent something that it does not know")
	}
}
