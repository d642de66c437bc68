package hold

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	nflog "github.com/florianl/go-nflog/v2"
	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/verdict"
)

func TestMain(m *testing.M) { os.Exit(podtest.Main(m)) }

var discard = slog.New(slog.DiscardHandler)

// The outside end of eth0 is inside the cluster; what is routed through it from elsewhere is not.
var cluster = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16"), netip.MustParsePrefix("fd99::/64")}

func dest(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// config is the default one, for tests in which the process may be the only user there is: it exempts none.
func config() Config { return Defaults(cluster...) }

// policy answers questions and counts them.
type policy struct {
	mu    sync.Mutex
	asked map[netip.AddrPort]int
	say   func(ctx context.Context, dest netip.AddrPort) (bool, error)
}

func (p *policy) Ask(ctx context.Context, dest netip.AddrPort) (bool, error) {
	p.mu.Lock()
	p.asked[dest]++
	p.mu.Unlock()
	return p.say(ctx, dest)
}

func (p *policy) count(dest netip.AddrPort) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked[dest]
}

func (p *policy) total() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, k := range p.asked {
		n += k
	}
	return n
}

// oddPorts admits odd ports.
func oddPorts(_ context.Context, dest netip.AddrPort) (bool, error) { return dest.Port()%2 == 1, nil }

func asker(say func(context.Context, netip.AddrPort) (bool, error)) *policy {
	return &policy{asked: map[netip.AddrPort]int{}, say: say}
}

// connect makes the pod's network with a redirect whose listener greets, and checks for leaks at the end.
func connect(t testing.TB) (outside *podtest.Outside, arrivals *capture) {
	t.Helper()
	if _, isTest := t.(*testing.T); isTest { // a benchmark has more goroutines around it
		t.Cleanup(func() { goleak.VerifyNone(t) })
	}
	outside = podtest.Connect(t)
	r, err := netfilter.New(netfilter.ByMark(), discard)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Remove(); err != nil {
			t.Error(err)
		}
	})
	return outside, newCapture(t)
}

// capture stands where Envoy listens. It greets with the destination that the app meant.
type capture struct{ n atomic.Int64 }

func newCapture(t testing.TB) *capture {
	t.Helper()
	l, err := net.Listen("tcp", "[::]:15001")
	if err != nil {
		t.Fatal(err)
	}
	c := &capture{}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c.n.Add(1)
			wg.Go(func() {
				_, _ = io.WriteString(conn, original(conn.(*net.TCPConn)))
				_ = conn.Close()
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return c
}

// original is the destination before the redirect, as Envoy's original_dst reads it.
func original(c *net.TCPConn) string {
	raw, err := c.SyscallConn()
	if err != nil {
		return err.Error()
	}
	v4 := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().Is4()
	var text string
	err = raw.Control(func(fd uintptr) { text = originalDst(int(fd), v4) })
	if err != nil {
		return err.Error()
	}
	return text
}

// open opens a Holder that does not run yet.
func open(t testing.TB, c Config, a Asker) *Holder {
	t.Helper()
	h, err := Open(c, a, discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		h.Close()
		if err := Remove(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// start lets it run until stop, or the end of the test.
func start(t testing.TB, h *Holder) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	bound := make(chan struct{})
	register := h.register
	h.register = func(ctx context.Context, fn nflog.HookFunc, errfn nflog.ErrorFunc) error {
		defer close(bound)
		return register(ctx, fn, errfn)
	}
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	<-bound
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

const refused = "refused"

// reach connects and returns the greeting, or what connect() said.
func reach(address string) string {
	d := net.Dialer{Timeout: 5 * time.Second}
	c, err := d.Dial("tcp", address)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case err != nil:
		return err.Error()
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	b, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func expect(t *testing.T, address, want string) {
	t.Helper()
	if got := reach(address); got != want {
		t.Errorf("%s: %q, not %q", address, got, want)
	}
}

// nothing tries to connect and expects that neither anything answers nor anything arrives.
func nothing(t *testing.T, arrivals *capture, address string) {
	t.Helper()
	before := arrivals.n.Load()
	d := net.Dialer{Timeout: 1500 * time.Millisecond} // TCP sends the SYN twice
	c, err := d.Dial("tcp", address)
	if err == nil {
		_ = c.Close()
		t.Fatalf("%s: connected", address)
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("%s: %v, not a timeout", address, err)
	}
	if n := arrivals.n.Load() - before; n != 0 {
		t.Errorf("%s: %d connections arrived", address, n)
	}
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) { //nolint:forbidigo // the kernel tells nobody of its counters
		if time.Now().After(deadline) {
			t.Fatalf("waited too long until %s", what)
		}
	}
}

// anywhere is the egress table of a pod that no policy isolates.
func anywhere() verdict.Table {
	return verdict.Table{Reasons: []verdict.Reason{{Text: "not isolated"}}, Blocks: []verdict.Block{{
		Protocol: verdict.TCP, Ports: []verdict.PortRange{verdict.AllPorts}, Peers: verdict.Peers{Anonymous: []verdict.Prefix{
			{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Verdict: verdict.Verdict{Allow: true}},
			{Prefix: netip.MustParsePrefix("::/0"), Verdict: verdict.Verdict{Allow: true}},
		}},
	}}}
}
