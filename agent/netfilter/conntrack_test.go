package netfilter

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	rtnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// track has conntrack know a flow, as if it had been seen.
func track(t testing.TB, protocol uint8, mark uint32, from, to, replier netip.AddrPort) {
	t.Helper()
	family := rtnetlink.InetFamily(unix.AF_INET)
	if from.Addr().Is6() {
		family = unix.AF_INET6
	}
	ip := func(a netip.AddrPort) net.IP { return a.Addr().AsSlice() }
	f := &rtnetlink.ConntrackFlow{
		FamilyType: uint8(family), TimeOut: 600, Mark: mark,
		Forward: rtnetlink.IPTuple{SrcIP: ip(from), DstIP: ip(to), SrcPort: from.Port(), DstPort: to.Port(), Protocol: protocol},
		Reverse: rtnetlink.IPTuple{SrcIP: ip(replier), DstIP: ip(from), SrcPort: replier.Port(), DstPort: from.Port(), Protocol: protocol},
	}
	if protocol == unix.IPPROTO_TCP {
		f.ProtoInfo = &rtnetlink.ProtoInfoTCP{State: 3} // TCP_CONNTRACK_ESTABLISHED
	}
	if err := rtnetlink.ConntrackCreate(rtnetlink.ConntrackTable, family, f); err != nil {
		t.Fatal(err)
	}
}

// known are the flows that conntrack has now.
func known(t testing.TB, protocols ...uint8) (list []Flow) {
	t.Helper()
	_, err := Forget(func(f *Flow) bool {
		list = append(list, Flow{Protocol: f.Protocol, Source: f.Source, Destination: f.Destination, Replier: f.Replier, Mark: f.Mark})
		return false
	}, protocols...)
	if err != nil {
		t.Fatal(err)
	}
	list = slices.DeleteFunc(list, func(f Flow) bool { return f.Source.Port() == 1 }) // see trackMany
	slices.SortFunc(list, func(a, b Flow) int { return a.Source.Compare(b.Source) })
	return list
}

func TestForget(t *testing.T) {
	testForget(t)
	if requests, err := readings([]uint8{unix.IPPROTO_UDP}); err != nil || len(requests) != 1 {
		t.Errorf("%d readings, %v", len(requests), err)
	}
	defer func() { // the namespace is that of the other tests, too
		if _, err := Forget(func(f *Flow) bool { return f.Source.Port() == 1 }, unix.IPPROTO_TCP); err != nil {
			t.Error(err)
		}
	}()
	trackMany(t, atOnce+1)
	if requests, err := readings([]uint8{unix.IPPROTO_UDP}); err != nil || len(requests) != 2 {
		t.Errorf("%d readings of many flows, %v", len(requests), err)
	}
	testForget(t)
}

// trackMany has conntrack know so many flows of TCP, from port 1.
func trackMany(t testing.TB, n int) {
	t.Helper()
	to := netip.MustParseAddrPort("10.9.1.1:80")
	for i := range n {
		track(t, unix.IPPROTO_TCP, 0, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)}), 1), to, to)
	}
}

func testForget(t *testing.T) {
	t.Helper()
	at := netip.MustParseAddrPort
	flows := []Flow{
		{Protocol: unix.IPPROTO_UDP, Source: at("10.9.0.1:1001"), Destination: at("10.9.1.1:53"), Replier: at("10.9.1.1:53")},
		{Protocol: unix.IPPROTO_UDP, Source: at("10.9.0.2:1002"), Destination: at("10.9.1.1:53"), Replier: at("10.9.1.9:5353"), Mark: 0x6d74}, // led elsewhere
		{Protocol: unix.IPPROTO_TCP, Source: at("10.9.0.3:1003"), Destination: at("10.9.1.1:53"), Replier: at("10.9.1.1:53")},
		{Protocol: unix.IPPROTO_UDP, Source: at("[fd09::1]:1001"), Destination: at("[fd09:1::1]:53"), Replier: at("[fd09:1::1]:53")},
		{Protocol: unix.IPPROTO_UDP, Source: at("[fd09::2]:1002"), Destination: at("[fd09:1::1]:53"), Replier: at("[fd09:1::1]:53")},
	}
	for _, f := range flows {
		track(t, f.Protocol, f.Mark, f.Source, f.Destination, f.Replier)
	}
	udp := []Flow{flows[0], flows[1], flows[3], flows[4]}
	if got := known(t, unix.IPPROTO_UDP); !equalFlows(got, udp) {
		t.Errorf("UDP: %+v, want %+v", got, udp)
	}
	if got := known(t, unix.IPPROTO_TCP); !equalFlows(got, flows[2:3]) {
		t.Errorf("TCP: %+v", got)
	}
	n, err := Forget(func(f *Flow) bool { return f.Source.Port() == 1002 }, unix.IPPROTO_UDP, unix.IPPROTO_SCTP)
	if n != 2 || err != nil {
		t.Errorf("forgot %d, %v", n, err)
	}
	if got := known(t, unix.IPPROTO_UDP, unix.IPPROTO_TCP); !equalFlows(got, []Flow{flows[0], flows[2], flows[3]}) {
		t.Errorf("left: %+v", got)
	}
	if n, err := Forget(func(f *Flow) bool { return f.Source.Port() == 1001 || f.Source.Port() == 1003 }, unix.IPPROTO_UDP, unix.IPPROTO_TCP); n != 3 || err != nil {
		t.Errorf("forgot %d of the others, %v", n, err)
	}
}

// What has the ends of a flow and another number is another one.
func TestForgetOnlyTheFlowThatWasRead(t *testing.T) {
	ends := []netip.AddrPort{netip.MustParseAddrPort("10.7.0.1:1001"), netip.MustParseAddrPort("10.7.1.1:53")}
	track(t, unix.IPPROTO_UDP, 0, ends[0], ends[1], ends[1])
	var read *Flow
	look := func() bool {
		read = nil
		if _, err := Forget(func(f *Flow) bool {
			if f.Source == ends[0] {
				read = f
			}
			return false
		}, unix.IPPROTO_UDP); err != nil {
			t.Fatal(err)
		}
		return read != nil
	}
	if !look() {
		t.Fatal("it is not known")
	}
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other := *read
	other.id = slices.Clone(read.id)
	other.id[0]++
	if err := other.forget(conn); !errors.Is(err, unix.ENOENT) {
		t.Errorf("another one: %v", err)
	}
	if !look() {
		t.Fatal("it is gone with another one")
	}
	if err := read.forget(conn); err != nil {
		t.Error(err)
	}
	if err := read.forget(conn); !errors.Is(err, unix.ENOENT) {
		t.Errorf("once more: %v", err)
	}
}

func equalFlows(a, b []Flow) bool {
	return slices.EqualFunc(a, b, func(a, b Flow) bool {
		return a.Protocol == b.Protocol && a.Source == b.Source && a.Destination == b.Destination && a.Replier == b.Replier && a.Mark == b.Mark
	})
}

// Whatever the kernel says: an error, or a flow with ends.
func FuzzParseFlow(f *testing.F) {
	ask, err := only(unix.IPPROTO_UDP)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append([]byte{unix.AF_INET, 0, 0, 0}, ask...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if flow, err := parseFlow(b); err == nil && (!flow.Source.IsValid() || !flow.Replier.IsValid()) {
			t.Errorf("%+v", flow)
		}
	})
}

// BenchmarkForget reads UDP flows where there are 30,000 of TCP, by turns as Forget does and as a library that reads all flows.
func BenchmarkForget(b *testing.B) {
	trackMany(b, 30_000)
	var ours, all time.Duration
	for b.Loop() {
		began := time.Now()
		known(b, unix.IPPROTO_UDP, unix.IPPROTO_SCTP)
		then := time.Now()
		if _, err := rtnetlink.ConntrackDeleteFilters(rtnetlink.ConntrackTable, unix.AF_UNSPEC, noFlow{}); err != nil {
			b.Fatal(err)
		}
		ours, all = ours+then.Sub(began), all+time.Since(then)
	}
	b.ReportMetric(float64(all)/float64(ours), "library/ours")
}

// noFlow is a filter that matches no flow.
type noFlow struct{}

func (noFlow) MatchConntrackFlow(*rtnetlink.ConntrackFlow) bool { return false }
