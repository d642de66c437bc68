package revoke

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/xds/names"
)

// capturePorts are what the redirect leads to.
var capturePorts = map[flows.Direction]int{flows.Inbound: names.InboundPort, flows.Outbound: names.OutboundPort}

// each runs a test for both directions and families, with listeners as Envoy and the app have them.
func each(t *testing.T, f func(t *testing.T, d flows.Direction, capture, app net.Listener)) {
	for d, port := range capturePorts {
		for _, host := range []string{"127.0.0.1", "[::1]"} {
			t.Run(fmt.Sprintf("%s %s", d, host), func(t *testing.T) {
				// Envoy's listener is one for both families.
				both := listen(t, fmt.Sprintf("[::]:%d", port))
				f(t, d, at{both, fmt.Sprintf("%s:%d", host, port)}, listen(t, host+":0"))
			})
		}
	}
}

// at is a listener on all addresses that is called by one.
type at struct {
	net.Listener
	address string
}

func (a at) Addr() net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(a.address)) }

// Verdicts that become narrower cut what they deny, and nothing else; each cut is taken down with its reason.
func TestSweep(t *testing.T) {
	each(t, func(t *testing.T, d flows.Direction, capture, app net.Listener) {
		defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
		w := newWorld(t)
		port := addressOf(app.Addr()).Port()
		w.admit(t, port, api, web)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { w.Run(ctx); close(ended) }()
		defer func() { cancel(); <-ended }()

		stays, goes := connect(t, d, capture, app, api.String()), connect(t, d, capture, app, web.String())
		w.Opened(stays.Connection)
		w.Opened(goes.Connection)
		stays.wantOpen(t)
		goes.wantOpen(t)
		w.admit(t, port, api)
		goes.wantCut(t)
		stays.wantOpen(t)
		later := connect(t, d, capture, app, api.String()) // the listeners are still there
		w.Opened(later.Connection)
		later.wantOpen(t)
		w.admit(t, port+1, api)
		stays.wantCut(t)
		later.wantCut(t)
		for deadline := time.Now().Add(patience); len(w.cutRecords()) < 3 && time.Now().Before(deadline); {
			runtime.Gosched()
		}
		records := w.cutRecords()
		if len(records) != 3 {
			t.Fatalf("%d records of 3 cuts", len(records))
		}
		r := records[0]
		if r.Verdict != flows.Revoked || r.Direction != d || r.Peer != web.String() || !r.Authenticated || r.Policy != "shop/db" || r.Reason == "" ||
			r.Source != goes.Source || r.Destination != goes.Destination || r.UpstreamLocal != goes.Local || r.DurationSeconds <= 0 {
			t.Errorf("record: %+v", r)
		}
	})
}

// A connection that is told of when it is denied already is cut at once, without a sweep: so is one that cannot be judged.
func TestLate(t *testing.T) {
	each(t, func(t *testing.T, d flows.Direction, capture, app net.Listener) {
		w := newWorld(t)
		port := addressOf(app.Addr()).Port()
		early := connect(t, d, capture, app, api.String())
		w.Opened(early.Connection) // no verdicts yet
		early.wantCut(t)
		w.admit(t, port, api)
		for _, peer := range []string{web.String(), "nonsense", "", names.Plaintext} {
			p := connect(t, d, capture, app, peer)
			w.Opened(p.Connection)
			p.wantCut(t)
		}
		lost := connect(t, d, capture, app, api.String())
		lost.Source = netip.AddrPort{}
		w.Opened(lost.Connection)
		if _, err := lost.app.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("a connection from nowhere lives on: %v", err)
		}
		always := connect(t, d, capture, app, "")
		always.Always = true
		w.Opened(always.Connection)
		w.sweep()
		always.wantOpen(t)
	})
}

// Newer verdicts have been received and are not yet applied: what they may have let pass is not cut by the old ones, an old connection is.
func TestComing(t *testing.T) {
	w := newWorld(t)
	app, capture := listen(t, "127.0.0.1:0"), listen(t, fmt.Sprintf("127.0.0.1:%d", names.InboundPort))
	port := addressOf(app.Addr()).Port()
	w.admit(t, port, web)
	old := connect(t, flows.Inbound, capture, app, web.String())
	w.Opened(old.Connection)
	w.mu.Lock()
	w.open[ends{old.Local, old.Remote}].told = time.Now().Add(-longest)
	w.mu.Unlock()
	w.admit(t, port)
	w.coming.Store(true)
	stays, goes := connect(t, flows.Inbound, capture, app, api.String()), connect(t, flows.Inbound, capture, app, web.String())
	w.Opened(stays.Connection)
	w.Opened(goes.Connection)
	w.sweep()
	old.wantCut(t)
	stays.wantOpen(t)
	goes.wantOpen(t)
	w.admit(t, port, api)
	w.coming.Store(false)
	goes.wantCut(t)
	stays.wantOpen(t)
}

// A connection has ended and its ports are used again: whoever has them now loses nothing.
func TestPortsUsedAgain(t *testing.T) {
	each(t, func(t *testing.T, d flows.Direction, capture, app net.Listener) {
		w := newWorld(t)
		w.admit(t, 1)
		old := connect(t, d, capture, app, web.String())
		host := old.Local.Addr()
		for _, c := range []net.Conn{old.onward, old.app, old.peer, old.taken} { // no TIME_WAIT
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
		l := listen(t, old.Local.String()) // the kernel would find this one for a connection that is gone
		if found, err := w.kernel.find([]ends{{old.Local, old.Remote}}); err != nil || found[0] != nil {
			t.Errorf("for a connection that is gone the kernel has %+v, %v", found[0], err)
		}
		w.Opened(old.Connection)
		if n := len(w.cutRecords()); n != 0 {
			t.Errorf("%d connections were cut that had ended", n)
		}
		other := &proxied{}
		other.peer, other.taken = pair(t, at{l, netip.AddrPortFrom(host, old.Local.Port()).String()})
		other.onward, other.app = pair(t, capture)
		other.wantOpen(t)
	})
}

// What has ended leaves the table, at once or when its last bytes have gone; a new connection of the same ports stays.
func TestClosed(t *testing.T) {
	w := newWorld(t)
	app := listen(t, "127.0.0.1:0")
	capture := listen(t, fmt.Sprintf("127.0.0.1:%d", names.InboundPort))
	w.admit(t, addressOf(app.Addr()).Port(), api)
	held := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.open)
	}
	p := connect(t, flows.Inbound, capture, app, api.String())
	w.Opened(p.Connection)
	end := func() flows.End { return flows.End{Began: p.Began, Local: p.Local, Remote: p.Remote} }
	before := end()
	before.Began = before.Began.Add(-time.Hour)
	w.Closed([]flows.End{before, end()}) // its sockets are still there
	if held() != 1 {
		t.Fatalf("%d in the table of 1", held())
	}
	w.admit(t, 1, api)
	w.sweep()
	p.wantCut(t)
	w.audit()
	if held() != 0 {
		t.Errorf("%d in the table after all have ended", held())
	}
	p = connect(t, flows.Inbound, capture, app, api.String())
	w.admit(t, addressOf(app.Addr()).Port(), api)
	w.Opened(p.Connection)
	_ = p.app.(*net.TCPConn).SetLinger(0)
	_ = p.app.Close()
	_, _ = p.onward.Read(make([]byte, 1))
	_ = p.onward.Close()
	before = end()
	before.Began = before.Began.Add(-time.Hour)
	w.Closed([]flows.End{before}) // of one that had the same ports
	if held() != 1 {
		t.Fatalf("%d in the table of 1", held())
	}
	other := end()
	other.Local = netip.AddrPortFrom(other.Local.Addr(), 1) // that nobody told of
	w.Closed([]flows.End{other, end()})
	if held() != 0 {
		t.Errorf("%d in the table after all have ended", held())
	}
	w.Closed([]flows.End{end()}) // its end comes by another stream, and may overtake its beginning
	w.Opened(p.Connection)
	if w.sweep(); held() != 1 || len(w.cutRecords()) != 1 {
		t.Errorf("%d in the table, %d cut in all", held(), len(w.cutRecords()))
	}
	if w.audit(); held() != 0 {
		t.Errorf("%d in the table after all have ended", held())
	}
	w.Opened(p.Connection)
	w.Forget()
	if held() != 0 {
		t.Errorf("%d in the table of an Envoy that is gone", held())
	}
}

// A socket of Envoy's that nobody told of is closed after a while, the agent's own and those of others never.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	app := listen(t, "127.0.0.1:0")
	w.admit(t, addressOf(app.Addr()).Port(), api)
	accept := func() net.Conn {
		t.Helper()
		c, err := app.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	envoys := func() net.Conn {
		t.Helper()
		var stderr bytes.Buffer
		cmd := exec.Command("/proc/self/exe") //nolint:noctx // it ends with its input
		cmd.Env = append(os.Environ(), dialler+"="+app.Addr().String())
		cmd.Stderr = &stderr
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			stdin.Close()
			if err := cmd.Wait(); err != nil {
				t.Error(err, stderr.String())
			}
		})
		return accept()
	}
	told := envoys()
	w.Opened(flows.Connection{
		Direction: flows.Inbound, Began: time.Now(), Peer: api.String(), Source: netip.MustParseAddrPort("192.0.2.1:1"), Destination: addressOf(app.Addr()),
		Local: addressOf(told.RemoteAddr()), Remote: addressOf(told.LocalAddr()),
	})
	untold := envoys()
	unmarked, others := pair(t, app)
	begin := time.Now()
	audit := func(after time.Duration) {
		t.Helper()
		all, err := w.kernel.list()
		if err != nil {
			t.Fatal(err)
		}
		if err := w.reconcile(all, begin.Add(after)); err != nil {
			t.Fatal(err)
		}
	}
	open := func(c net.Conn) bool {
		_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
		_, err := c.Read(make([]byte, 1))
		return isTimeout(err)
	}
	audit(0)
	audit(grace - 1)
	for name, c := range map[string]net.Conn{"told": told, "untold": untold, "unmarked": unmarked, "others": others} {
		if !open(c) {
			t.Errorf("%s: cut within the grace", name)
		}
	}
	audit(grace)
	for name, c := range map[string]net.Conn{"told": told, "unmarked": unmarked, "others": others} {
		if !open(c) {
			t.Errorf("%s: cut", name)
		}
	}
	if open(untold) {
		t.Error("a connection that nobody told of lives on")
	}
}

// BenchmarkSweep judges 50,000 open connections, all of which stay.
func BenchmarkSweep(b *testing.B) {
	w := newWorld(b)
	w.admit(b, 80, api)
	for i := range 50_000 {
		remote := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), uint16(1024+i%60000))
		w.Opened(flows.Connection{Direction: flows.Inbound, Began: time.Now(), Peer: api.String(), Source: remote,
			Destination: netip.MustParseAddrPort("10.1.0.1:80"), Local: remote, Remote: netip.MustParseAddrPort("10.1.0.1:80")})
	}
	for b.Loop() {
		w.sweep()
	}
}

// BenchmarkCut cuts connections, 1,000 at a time.
func BenchmarkCut(b *testing.B) {
	w := newWorld(b)
	app := listen(b, "127.0.0.1:0")
	capture := listen(b, fmt.Sprintf("127.0.0.1:%d", names.InboundPort))
	port := addressOf(app.Addr()).Port()
	const n = 1000
	for b.Loop() {
		b.StopTimer()
		w.admit(b, port, api)
		for range n {
			w.Opened(connect(b, flows.Inbound, capture, app, api.String()).Connection)
		}
		w.admit(b, port)
		before := len(w.cutRecords())
		b.StartTimer()
		w.sweep()
		b.StopTimer()
		if got := len(w.cutRecords()) - before; got != n {
			b.Fatalf("%d of %d cut", got, n)
		}
		w.Forget()
		b.StartTimer()
	}
}
