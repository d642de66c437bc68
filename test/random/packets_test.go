package random

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
)

// packetEnds are both directions of something that judges packets in the pods' network namespaces.
type packetEnds interface {
	ingress(pod string, proto verdict.Protocol, port uint16, from netip.Addr) bool
	egress(pod string, proto verdict.Protocol, port uint16, to netip.Addr) bool
}

// packetsDiffer returns the first UDP or SCTP flow on which the two ends' packet policies and the oracle differ. There is no slipping past
// a sidecar here: what the pod sends passes the same rules whoever in it sends it.
func packetsDiffer(w oracle.World, ends packetEnds) (found error) {
	for _, c := range w.Connections() {
		if c.Protocol == verdict.TCP || c.Plaintext {
			continue
		}
		want, why := w.Allowed(c)
		got := true
		if isPod(c.From) && oracle.Sidecar(c.From) {
			got = ends.egress(key(c.From), c.Protocol, c.Port, c.ToAddr)
		}
		if isPod(c.To) && oracle.Sidecar(c.To) {
			got = got && ends.ingress(key(c.To), c.Protocol, c.Port, c.FromAddr)
		}
		if got != want {
			return fmt.Errorf("%s: allowed=%v; the oracle: %v, %s", c, got, want, why)
		}
	}
	return nil
}

// byValue judges by the compiled value.
type byValue map[string]verdict.Packets

func (v byValue) ingress(pod string, proto verdict.Protocol, port uint16, from netip.Addr) bool {
	p := v[pod]
	return p.AllowsIngress(proto, port, from)
}

func (v byValue) egress(pod string, proto verdict.Protocol, port uint16, to netip.Addr) bool {
	p := v[pod]
	return p.AllowsEgress(proto, port, to)
}

// packetsOf compiles the packet policy of every pod that has a sidecar, and wants valid values.
func packetsOf(w oracle.World, x *policy.Index) (byValue, error) {
	out := byValue{}
	for _, p := range w.Objects.Pods {
		if !isPod(p) || !oracle.Sidecar(p) {
			continue
		}
		v := x.Packets(key(p))
		if err := v.Validate(); err != nil {
			return nil, fmt.Errorf("pod %s: %w", key(p), err)
		}
		out[key(p)] = v
	}
	return out, nil
}

func TestPacketsAgreeWithOracle(t *testing.T) {
	check := func(w oracle.World) error {
		x, err := indexOf(w)
		if err != nil {
			return err
		}
		v, err := packetsOf(w, x)
		if err != nil {
			return err
		}
		return packetsDiffer(w, v)
	}
	for i := range *worlds {
		w := oracle.Generate(rand.New(rand.NewPCG(*seed+uint64(i), 0)), oracle.Small)
		if check(w) == nil {
			continue
		}
		small := oracle.Shrink(w, func(w oracle.World) bool { return check(w) != nil })
		t.Fatalf("world %d: %v\n%s", *seed+uint64(i), check(small), small.YAML())
	}
}
