package hold

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
)

func TestFirstConnect(t *testing.T) {
	_, arrivals := connect(t)
	p := asker(oddPorts)
	refusals := make(chan Refusal, 100)
	cfg := config()
	cfg.Refused = func(r Refusal) { refusals <- r }
	start(t, open(t, cfg, p))
	for _, c := range []struct{ address, want string }{
		{"10.99.0.1:81", "10.99.0.1:81"}, {"10.99.0.1:80", refused},
		{"[fd99::1]:81", "[fd99::1]:81"}, {"[fd99::1]:80", refused},
	} {
		before := arrivals.n.Load()
		for i := range 3 {
			at := time.Now()
			expect(t, c.address, c.want)
			t.Logf("%s, attempt %d: %v", c.address, i+1, time.Since(at).Round(10*time.Microsecond))
		}
		for range 3 {
			if c.want == refused {
				if r := <-refusals; r.Destination != dest(c.address) || !r.Source.IsValid() || r.Inbound {
					t.Errorf("%s: told of %+v", c.address, r)
				}
			}
		}
		if n := p.count(dest(c.address)); n != 1 {
			t.Errorf("%s: asked %d times", c.address, n)
		}
		if n := arrivals.n.Load() - before; c.want == refused && n != 0 || c.want != refused && n != 3 {
			t.Errorf("%s: %d connections arrived", c.address, n)
		}
	}
}

func TestFlip(t *testing.T) {
	connect(t)
	p := asker(oddPorts)
	h := open(t, config(), p)
	start(t, h)
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	expect(t, "10.99.0.1:80", refused)
	expect(t, "[fd99::1]:81", "[fd99::1]:81")
	for range 3 {
		if err := h.Flip(map[netip.AddrPort]bool{dest("10.99.0.1:81"): false, dest("10.99.0.1:80"): true, dest("[fd99::1]:81"): false}); err != nil {
			t.Fatal(err)
		}
		expect(t, "10.99.0.1:81", refused)
		expect(t, "10.99.0.1:80", "10.99.0.1:80")
		expect(t, "[fd99::1]:81", refused)
		if err := h.Flip(map[netip.AddrPort]bool{dest("10.99.0.1:81"): true, dest("10.99.0.1:80"): false, dest("[fd99::1]:81"): true}); err != nil {
			t.Fatal(err)
		}
		expect(t, "10.99.0.1:81", "10.99.0.1:81")
		expect(t, "10.99.0.1:80", refused)
		expect(t, "[fd99::1]:81", "[fd99::1]:81")
	}
	if n := p.total(); n != 3 {
		t.Errorf("asked %d times for 3 destinations", n)
	}
	if err := h.Forget(dest("10.99.0.1:81"), dest("10.99.0.1:80")); err != nil {
		t.Fatal(err)
	}
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	expect(t, "10.99.0.1:80", refused)
	if n := p.total(); n != 5 {
		t.Errorf("asked %d times, not twice more after Forget", n)
	}
}

// What Set says while a question is out is newer than its answer.
func TestSetOverrulesAnswer(t *testing.T) {
	connect(t)
	asked, answer := make(chan struct{}), make(chan struct{})
	p := asker(func(context.Context, netip.AddrPort) (bool, error) {
		close(asked)
		<-answer
		return true, nil
	})
	h := open(t, config(), p)
	start(t, h)
	got := make(chan string, 1)
	go func() { got <- reach("10.99.0.1:81") }()
	<-asked
	if err := h.Set(dest("10.99.0.1:81"), false); err != nil {
		t.Fatal(err)
	}
	close(answer)
	if g := <-got; g != refused {
		t.Errorf("%q, not refused", g)
	}
	expect(t, "10.99.0.1:81", refused)
}

// What is forgotten while its answer is on its way is asked about again.
func TestForgetOverrulesAnswer(t *testing.T) {
	connect(t)
	asked, answer := make(chan struct{}, 8), make(chan bool)
	p := asker(func(context.Context, netip.AddrPort) (bool, error) {
		asked <- struct{}{}
		return <-answer, nil
	})
	h := open(t, config(), p)
	start(t, h)
	got := make(chan string, 1)
	go func() { got <- reach("10.99.0.1:80") }()
	<-asked
	if err := h.Forget(dest("10.99.0.1:80")); err != nil {
		t.Fatal(err)
	}
	answer <- false // of before
	<-asked
	answer <- true
	if g := <-got; g != "10.99.0.1:80" {
		t.Errorf("%q, not reached", g)
	}
}

func TestNoAnswerIsNo(t *testing.T) {
	_, arrivals := connect(t)
	var mu sync.Mutex
	broken := true
	p := asker(func(ctx context.Context, d netip.AddrPort) (bool, error) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case broken && d.Port() == 81:
			return true, errors.New("the control plane is away")
		case broken:
			<-ctx.Done()
			return true, nil // too late
		}
		return true, nil
	})
	c := config()
	c.Patience, c.ErrorTTL = 100*time.Millisecond, 300*time.Millisecond
	h := open(t, c, p)
	start(t, h)
	for _, a := range []string{"10.99.0.1:81", "[fd99::1]:81", "10.99.0.1:83"} {
		expect(t, a, refused)
	}
	if n := arrivals.n.Load(); n != 0 {
		t.Errorf("%d connections arrived", n)
	}
	mu.Lock()
	broken = false
	mu.Unlock()
	await(t, "the denial ends", func() bool { return reach("10.99.0.1:81") == "10.99.0.1:81" })
}

// Nothing passes before Run, after Run, nor after Close; a new Holder begins from nothing.
func TestNobodyThere(t *testing.T) {
	_, arrivals := connect(t)
	p := asker(oddPorts)
	h := open(t, config(), p)
	nothing(t, arrivals, "10.99.0.1:81")
	stop := start(t, h)
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	stop()
	expect(t, "10.99.0.1:81", "10.99.0.1:81") // known, and Envoy is the authority
	nothing(t, arrivals, "10.99.0.1:83")
	nothing(t, arrivals, "[fd99::1]:83")
	h.Close()
	nothing(t, arrivals, "10.99.0.1:85")
	if n := p.total(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	start(t, open(t, config(), p))
	expect(t, "10.99.0.1:83", "10.99.0.1:83")
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	if n := p.count(dest("10.99.0.1:81")); n != 2 {
		t.Errorf("the new holder asked %d times in all, not 2", n)
	}
}

// A connection that is waiting when the holder comes gets its answer when TCP sends the SYN again.
func TestLateHolder(t *testing.T) {
	connect(t)
	h := open(t, config(), asker(oddPorts))
	got := make(chan string, 2)
	for _, a := range []string{"10.99.0.1:81", "10.99.0.1:80"} {
		go func() { got <- reach(a) }()
	}
	start(t, h)
	for range 2 {
		if g := <-got; g != "10.99.0.1:81" && g != refused {
			t.Error(g)
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	connect(t)
	p := asker(oddPorts)
	h := open(t, config(), p)
	start(t, h)
	var wg sync.WaitGroup
	for i := range 500 {
		a := netip.AddrPortFrom(netip.MustParseAddr([]string{"10.99.0.1", "fd99::1"}[i%2]), uint16(1000+i/2%100)).String()
		wg.Go(func() {
			want := a
			if dest(a).Port()%2 == 0 {
				want = refused
			}
			if got := reach(a); got != want {
				t.Errorf("%s: %q, not %q", a, got, want)
			}
		})
	}
	wg.Wait()
	if n := p.total(); n < 200 || n >= 400 { // on a busy machine a SYN may be read long after its destination was answered
		t.Errorf("asked %d times for 500 connections to 200 destinations", n)
	}
	await(t, "nothing is kept", func() bool { s := h.Sizes(); return s.Questions == 0 && s.Held == 0 })
}

func TestExempt(t *testing.T) {
	outside, _ := connect(t)
	p := asker(func(context.Context, netip.AddrPort) (bool, error) { return false, nil })
	c := config()
	c.Exempt = []netip.Addr{netip.MustParseAddr("10.99.0.1")}
	open(t, c, p) // nobody answers
	greet(t, outside.Listen(t, "[fd99::1]:4000"), "direct")
	for _, a := range []string{"127.0.0.1:15001", "10.99.0.2:15001", "[::1]:15001", "[fd99::2]:15001"} { // itself
		if got := reach(a); got == refused || len(got) == 0 {
			t.Errorf("%s: %q", a, got)
		}
	}
	expect(t, "10.99.0.1:80", "10.99.0.1:80") // its node
	conn, err := netfilter.Dial(t.Context(), "tcp", "[fd99::1]:4000")
	if err != nil {
		t.Fatalf("with the proxy's mark: %v", err)
	}
	_ = conn.Close()
	if n := p.total(); n != 0 {
		t.Errorf("asked %d times", n)
	}
}

func TestAgeing(t *testing.T) {
	connect(t)
	p := asker(oddPorts)
	c := config()
	c.Idle = time.Second
	var mu sync.Mutex
	gone := map[netip.AddrPort]bool{}
	c.Forgotten = func(dests []netip.AddrPort) {
		mu.Lock()
		defer mu.Unlock()
		for _, d := range dests {
			gone[d] = true
		}
	}
	h := open(t, c, p)
	start(t, h)
	expect(t, "10.99.0.1:81", "10.99.0.1:81")
	expect(t, "10.99.0.1:83", "10.99.0.1:83")
	expect(t, "10.99.0.1:80", refused)
	// The one in use outlives what the kernel gave it at first, twice over; the others go.
	for end := time.Now().Add(5 * c.Idle); time.Now().Before(end); time.Sleep(100 * time.Millisecond) { //nolint:forbidigo // use goes on for longer than an unused element lives
		expect(t, "10.99.0.1:81", "10.99.0.1:81")
	}
	await(t, "the idle ones are forgotten", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return gone[dest("10.99.0.1:83")] && gone[dest("10.99.0.1:80")]
	})
	expect(t, "10.99.0.1:83", "10.99.0.1:83")
	if n := p.count(dest("10.99.0.1:83")); n != 2 {
		t.Errorf("the idle one was asked about %d times, not 2", n)
	}
}

// Where the kernel has no NFLOG unknown destinations go on, and what Set says is enforced.
func TestWithoutNFLOG(t *testing.T) {
	connect(t)
	p := asker(oddPorts)
	c := config()
	c.Binding = func() error { return unix.EINVAL }
	h := open(t, c, p)
	if !h.Holding() {
		t.Error("does not hold")
	}
	start(t, h)
	await(t, "the fallback", func() bool { return !h.Holding() })
	for _, a := range []string{"10.99.0.1:80", "[fd99::1]:80"} {
		expect(t, a, a)
		if err := h.Set(dest(a), false); err != nil {
			t.Fatal(err)
		}
		expect(t, a, refused)
		if err := h.Set(dest(a), true); err != nil {
			t.Fatal(err)
		}
		expect(t, a, a)
	}
}

// A group that somebody else listens to is no kernel without NFLOG: that must not open anything.
func TestGroupTaken(t *testing.T) {
	_, arrivals := connect(t)
	start(t, open(t, config(), asker(oddPorts)))
	second := open(t, config(), asker(oddPorts))
	if err := second.Run(t.Context()); err == nil {
		t.Fatal("two holders of one group")
	}
	if !second.Holding() {
		t.Error("holds nothing")
	}
	_ = arrivals
}

// When the table is taken away under a running holder, Run says so.
func TestTableGone(t *testing.T) {
	connect(t)
	h := open(t, config(), asker(oddPorts))
	ended := make(chan error, 1)
	go func() { ended <- h.Run(context.Background()) }()
	if err := Remove(); err != nil {
		t.Fatal(err)
	}
	if err := h.Set(dest("10.99.0.1:80"), true); err == nil {
		t.Error("Set wrote to no table")
	}
	if err := <-ended; err == nil {
		t.Error("Run ended well")
	}
}
