package revoke

import (
	"net/netip"
	"os"
	"slices"
	"testing"
)

func TestListeners(t *testing.T) {
	var want []Listener
	for address, as := range map[string]string{"[::]:0": "::", "127.0.0.1:0": "127.0.0.1", "[::1]:0": "::1"} {
		l := listen(t, address)
		port := addressOf(l.Addr()).Port()
		want = append(want, Listener{netip.AddrPortFrom(netip.MustParseAddr(as), port), uint32(os.Getuid())})
		if as == "127.0.0.1" {
			pair(t, l) // connections are none
		}
	}
	got, err := Listeners()
	if err != nil {
		t.Fatal(err)
	}
	order := func(a, b Listener) int { return a.Address.Compare(b.Address) }
	slices.SortFunc(got, order)
	slices.SortFunc(want, order)
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
