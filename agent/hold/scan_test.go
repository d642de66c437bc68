package hold

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// scan sends a SYN to each destination as an app with a raw socket could, faster than any connect().
func scan(t *testing.T, dests func(yield func(netip.AddrPort) bool)) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for d := range dests {
		if err := unix.Sendto(fd, synTo(d, nil), 0, &unix.SockaddrInet4{Addr: d.Addr().As4()}); err != nil && !errors.Is(err, unix.EPERM) {
			t.Fatal(err)
		}
	}
}

// synTo is an IPv4 SYN from the pod.
func synTo(d netip.AddrPort, data []byte) []byte {
	p := make([]byte, 40, 40+len(data))
	p = append(p, data...)
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:], []byte{10, 99, 0, 2})
	copy(p[16:], d.Addr().AsSlice())
	binary.BigEndian.PutUint16(p[20:], 4321)
	binary.BigEndian.PutUint16(p[22:], d.Port())
	p[32], p[33] = 5<<4, flagSYN
	binary.BigEndian.PutUint16(p[36:], checksum(p[12:20], p[20:]))
	return p
}

// A scan meets every bound, opens nothing, and pushes no allowed destination out.
func TestScan(t *testing.T) {
	_, arrivals := connect(t)
	route(t, "10.99.1.0/24", "10.99.0.1")
	var outstanding, most atomic.Int64
	p := asker(func(ctx context.Context, d netip.AddrPort) (bool, error) {
		n := outstanding.Add(1)
		defer outstanding.Add(-1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		if d.Port() == 81 {
			return true, nil
		}
		select { // as slow as a control plane under load
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(20 * time.Millisecond):
			return false, nil
		}
	})
	c := config()
	c.Rate, c.MaxQuestions, c.MaxHeld, c.MaxAllowed, c.MaxDenied = 500, 32, 64, 16, 100
	h := open(t, c, p)
	stop := start(t, h)
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	base := arrivals.n.Load()
	begun := time.Now()
	scan(t, func(yield func(netip.AddrPort) bool) {
		for host := range 256 {
			for port := 1000; port < 65000; port += 257 {
				if !yield(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 99, 1, byte(host)}), uint16(port))) {
					return
				}
				if s := h.Sizes(); s.Questions > c.MaxQuestions || s.Held > c.MaxHeld || s.Denied > c.MaxDenied || s.Allowed > c.MaxAllowed {
					t.Fatalf("%+v is above the bounds", s)
				}
			}
		}
	})
	took := time.Since(begun)
	await(t, "all questions are answered", func() bool { return h.Sizes().Questions == 0 })
	if n := arrivals.n.Load() - base; n != 0 {
		t.Errorf("%d connections arrived", n)
	}
	if most.Load() > int64(c.MaxQuestions) {
		t.Errorf("%d questions at a time", most.Load())
	}
	if n, limit := p.total(), int((took.Seconds()+2)*float64(c.Rate))+int(c.Rate); n > limit {
		t.Errorf("%d questions in %v, more than %d", n, took, limit)
	}
	t.Logf("%d questions in %v, %d at a time", p.total(), took.Round(time.Millisecond), most.Load())
	stop() // the kernel is this goroutine's from here on
	for i, s := range h.kernel.sets {
		for set, limit := range map[string]int{s.denied.Name: c.MaxDenied, s.allowed.Name: c.MaxAllowed, s.used.Name: c.MaxAllowed} {
			got, err := h.kernel.conn.GetSetByName(table(), set)
			if err != nil {
				t.Fatal(err)
			}
			elements, err := h.kernel.conn.GetSetElements(got)
			if err != nil {
				t.Fatal(err)
			}
			if len(elements) > limit {
				t.Errorf("the kernel has %d elements in %s", len(elements), set)
			}
			if i == 0 && len(elements) == 0 {
				t.Errorf("the kernel has no element in %s: the test saw nothing", set)
			}
		}
	}
	asked := p.count(dest("10.99.0.1:81"))
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	if n := p.count(dest("10.99.0.1:81")); n != asked {
		t.Error("the scan pushed out an allowed destination")
	}
}

// More allowed destinations than fit: the least recently used go, from the kernel as well, and all connect.
func TestMoreThanFit(t *testing.T) {
	connect(t)
	p := asker(func(context.Context, netip.AddrPort) (bool, error) { return true, nil })
	c := config()
	c.MaxAllowed = 4
	evicted := make(chan netip.AddrPort, 2000)
	c.Forgotten = func(dests []netip.AddrPort) {
		for _, d := range dests {
			evicted <- d
		}
	}
	h := open(t, c, p)
	start(t, h)
	for port := range 10 {
		a := netip.AddrPortFrom(netip.MustParseAddr("10.99.0.1"), uint16(100+port)).String()
		expect(t, a, a)
	}
	for port := range 6 {
		if d := <-evicted; int(d.Port()) != 100+port {
			t.Errorf("%s evicted, not port %d", d, 100+port)
		}
	}
	if s := h.Sizes(); s.Allowed != 4 {
		t.Errorf("%+v", s)
	}
	expect(t, "10.99.0.1:100", "10.99.0.1:100")
	if n := p.count(dest("10.99.0.1:100")); n != 2 {
		t.Errorf("asked %d times, not again", n)
	}
	// One transaction with more than fit keeps to the bound, too.
	many := map[netip.AddrPort]bool{}
	for port := range 1000 {
		many[netip.AddrPortFrom(netip.MustParseAddr("10.99.0.1"), uint16(2000+port))] = true
	}
	if err := h.Flip(many); err != nil {
		t.Fatal(err)
	}
	if s := h.Sizes(); s.Allowed != 4 {
		t.Errorf("%+v", s)
	}
	h.mu.Lock()
	elements, err := h.kernel.conn.GetSetElements(h.kernel.sets[0].allowed)
	h.mu.Unlock()
	if err != nil || len(elements) != 4 {
		t.Errorf("the kernel has %d elements, %v", len(elements), err)
	}
}

func TestLedgerUnderScan(t *testing.T) {
	l := newLedger(64, 4096)
	now := time.Now()
	good := dest("10.0.0.1:80")
	l.put(good, true, now, now.Add(time.Hour))
	evictions := 0
	for host := range 256 {
		for port := 1; port <= 65000; port += 29 {
			evictions += len(l.put(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, byte(host)}), uint16(port)), false, now, now.Add(time.Minute)))
		}
	}
	if len(l.known) != 4097 || l.recent[0].Len() != 4096 || l.recent[1].Len() != 1 {
		t.Errorf("%d known, %d denied, %d allowed", len(l.known), l.recent[0].Len(), l.recent[1].Len())
	}
	if want := 256*2242 - 4096; evictions != want {
		t.Errorf("%d evictions, not %d", evictions, want)
	}
	gone, renew := l.age(now.Add(2*time.Minute), 10*time.Minute)
	if len(gone) != 4096 || len(renew) != 0 {
		t.Errorf("%d gone, %d to renew", len(gone), len(renew))
	}
	l.use(good, now.Add(50*time.Minute))
	if _, renew := l.age(now.Add(50*time.Minute), 10*time.Minute); len(renew) != 1 || renew[0] != good {
		t.Errorf("to renew: %v", renew)
	}
}

func TestParse(t *testing.T) {
	d := dest("10.99.0.1:81")
	whole := synTo(d, []byte("odd"))
	partial := synTo(d, []byte("odd"))
	partial[36], partial[37] = 0xab, 0xcd
	p, err := parse(partial)
	if err != nil || p.dest != d || string(p.packet) != string(whole) {
		t.Fatalf("%v %v", p, err)
	}
	// Summed with its checksum in place, a segment gives zero.
	if sum := checksum(p.packet[12:20], p.packet[20:]); sum != 0 {
		t.Errorf("checksum is off by %#x", sum)
	}
	for name, change := range map[string]func(p []byte) []byte{
		"empty":          func([]byte) []byte { return nil },
		"cut short":      func(p []byte) []byte { return p[:39] },
		"longer":         func(p []byte) []byte { return append(p, 0) },
		"too long":       func(p []byte) []byte { return append(p, make([]byte, maxSYN)...) },
		"UDP":            func(p []byte) []byte { p[9] = unix.IPPROTO_UDP; return p },
		"SYN-ACK":        func(p []byte) []byte { p[33] |= flagACK; return p },
		"ACK":            func(p []byte) []byte { p[33] = flagACK; return p },
		"fragment":       func(p []byte) []byte { p[6] = 0x20; return p },
		"header too big": func(p []byte) []byte { p[0] = 0x4f; return p },
		"version 5":      func(p []byte) []byte { p[0] = 0x55; return p },
		"version 6":      func(p []byte) []byte { p[0] = 0x65; return p },
	} {
		if p, err := parse(change(synTo(d, nil))); err == nil {
			t.Errorf("%s: taken for a SYN to %s", name, p.dest)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(synTo(dest("10.99.0.1:81"), nil))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 20, 6, 64}, make([]byte, 52)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parse(b); err == nil && (len(p.packet) != len(b) || !p.dest.Addr().IsValid()) {
			t.Errorf("%x: %v", b, p)
		}
	})
}
