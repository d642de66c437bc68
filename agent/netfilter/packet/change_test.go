package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Policies that come one after the other leave the very table that each would have made alone: chains and rules, sets and their elements.
func TestChangesMakeTheSameTable(t *testing.T) {
	surroundings(t)
	rnd := rand.New(rand.NewPCG(3, 4))
	conn := kernel(t)
	t.Cleanup(func() { _ = Remove(kernel(t)) })
	var before *Ruleset
	elements := 0
	for i := range 150 {
		p := changing(rnd)
		next, err := Emit(p, names.ProxyMark)
		if err != nil {
			t.Fatal(err)
		}
		if before == nil {
			err = next.Apply(conn)
		} else {
			err = conn.Do(func(c *nftables.Conn) error { return next.change(c, before) })
		}
		if err != nil {
			t.Fatalf("policy %d: %v", i, err)
		}
		before = next
		if err := Check(conn, p); err != nil {
			t.Fatalf("policy %d: %v", i, err)
		}
		for j := range next.Sets {
			want, got := described(next.Sets[j].Elements), described(inKernel(t, conn, next.Sets[j].Set))
			if !slices.Equal(got, want) {
				t.Fatalf("policy %d, set %s: it has %q, not %q", i, next.Sets[j].Name, got, want)
			}
			elements += len(got)
		}
		next.forgetPeers()
	}
	if elements == 0 {
		t.Error("no policy had anything in its sets")
	}
}

// changing draws a policy that has much in common with others that it draws.
func changing(rnd *rand.Rand) *verdict.Packets {
	p := smallPackets(rnd)
	for _, blocks := range [][]verdict.PacketBlock{p.Ingress, p.Egress} {
		for i := range blocks {
			for j := range blocks[i].Ports { // from 1
				blocks[i].Ports[j].First++
				blocks[i].Ports[j].Last++
			}
		}
	}
	for _, vip := range append(addrs("10.96.0.1", "10.96.0.2", "fd96::1"), p.Node...) { // the last of them are node ports
		if rnd.IntN(2) == 0 {
			continue
		}
		s := verdict.PacketService{Protocol: verdict.UDP, Addr: netip.AddrPortFrom(vip, 53+uint16(rnd.IntN(2)))}
		for n := range rnd.IntN(3) {
			to := netip.AddrFrom4([4]byte{10, 64, 0, byte(n + 1)})
			if vip.Is6() {
				to = netip.MustParseAddr(fmt.Sprintf("fd64::%d", n+1))
			}
			s.Endpoints = append(s.Endpoints, netip.AddrPortFrom(to, 53))
		}
		p.Services = append(p.Services, s)
	}
	slices.SortFunc(p.Services, func(a, b verdict.PacketService) int { return a.Addr.Compare(b.Addr) })
	return p
}

func inKernel(t *testing.T, conn *netfilter.Conn, s *nftables.Set) (elements []nftables.SetElement) {
	t.Helper()
	if err := conn.Do(func(c *nftables.Conn) (err error) { elements, err = c.GetSetElements(s); return err }); err != nil {
		t.Fatalf("set %s: %v", s.Name, err)
	}
	return elements
}

// described are elements in words, in an order of their own. The library reads verdicts back as the attributes that they are: code and chain.
func described(elements []nftables.SetElement) (out []string) {
	for _, e := range elements {
		if e.VerdictData != nil {
			e.Val = binary.NativeEndian.AppendUint16(nil, 8)
			e.Val = binary.NativeEndian.AppendUint16(e.Val, unix.NFTA_VERDICT_CODE)
			e.Val = binary.BigEndian.AppendUint32(e.Val, uint32(e.VerdictData.Kind))
			e.Val = binary.NativeEndian.AppendUint16(e.Val, uint16(4+len(e.VerdictData.Chain)+1))
			e.Val = binary.NativeEndian.AppendUint16(e.Val, unix.NFTA_VERDICT_CHAIN)
			e.Val = append(e.Val, e.VerdictData.Chain...)
		}
		out = append(out, fmt.Sprintf("%x %x end=%v", e.Key, bytes.TrimRight(e.Val, "\x00"), e.IntervalEnd))
	}
	slices.Sort(out)
	return out
}

// Whatever somebody else has done to the table, the next policy is in force.
func TestApplyAfterSomebodyElse(t *testing.T) {
	surroundings(t)
	first := here(verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.99.0.3/32")}})
	second := here(verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.99.0.4/32")}})
	rs, err := Emit(first, names.ProxyMark)
	if err != nil {
		t.Fatal(err)
	}
	meddler, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	led := rs.Chains[len(rs.Chains)-1].Chain
	for name, meddle := range map[string]func(){
		"table gone": func() { meddler.DelTable(rs.Table) },
		"peers gone": func() {
			meddler.FlushTable(rs.Table)
			for i := range rs.Sets {
				meddler.DelSet(rs.Sets[i].Set)
			}
			meddler.DelChain(led)
		},
		"everything gone": func() { meddler.FlushRuleset() },
	} {
		t.Run(name, func(t *testing.T) {
			table := OpenTable(slog.New(slog.DiscardHandler))
			t.Cleanup(table.Close)
			t.Cleanup(func() { _ = Remove(kernel(t)) })
			if err := table.Apply(first); err != nil {
				t.Fatal(err)
			}
			meddle()
			if err := meddler.Flush(); err != nil {
				t.Fatal(err)
			}
			if err := table.Apply(second); err != nil {
				t.Fatal(err)
			}
			if err := table.Check(second); err != nil {
				t.Error(err)
			}
			c := socket(t, nil, "10.99.0.2:0")
			if send(t, c, to(peers[0], 53), "x") || !send(t, c, to(peers[1], 53), "x") {
				t.Error("the policy is not in force")
			}
		})
	}
}
