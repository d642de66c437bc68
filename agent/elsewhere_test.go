package agent

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/podtest"
)

// The addresses of shop/api, inside the cluster; those of the outside end of eth0 are not.
var apiAddrs = []netip.Addr{netip.MustParseAddr("10.98.0.1"), netip.MustParseAddr("fd98::1")}

// elsewhere gives the outside the addresses of shop/api and the pod a route to them. Both go away with eth0 and the outside.
func elsewhere(t *testing.T, outside *podtest.Outside) {
	t.Helper()
	outside.Do(func() {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range apiAddrs {
			ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			if err := netlink.AddrAdd(lo, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
				t.Error(err)
			}
		}
	})
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for i, gateway := range []netip.Addr{podtest.OutsideIPv4, podtest.OutsideIPv6} {
		to := &net.IPNet{IP: apiAddrs[i].AsSlice(), Mask: net.CIDRMask(apiAddrs[i].BitLen(), apiAddrs[i].BitLen())}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: to, Gw: gateway.AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
}

// apiDialer dials as shop/api.
func apiDialer(to string) *net.Dialer {
	from := apiAddrs[1]
	if netip.MustParseAddrPort(to).Addr().Is4() {
		from = apiAddrs[0]
	}
	return &net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
}
