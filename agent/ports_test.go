package agent

import (
	"net"
	"os"
	"slices"
	"testing"
)

// A port counts where who is meant listens on all addresses.
func TestNotListening(t *testing.T) {
	port := func(address string) uint16 {
		l, err := net.Listen("tcp", address) //nolint:noctx // on loopback
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return uint16(l.Addr().(*net.TCPAddr).Port)
	}
	all, loopback := port("[::]:0"), port("127.0.0.1:0")
	for _, tt := range []struct {
		uid  uint32
		want []uint16
	}{{uint32(os.Getuid()), []uint16{loopback, 1}}, {uint32(os.Getuid()) + 1, []uint16{all, loopback, 1}}} {
		if got, err := notListening(tt.uid, all, loopback, 1); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("user %d: %v, %v, want %v", tt.uid, got, err, tt.want)
		}
	}
}
