package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// indexed answers from the policy itself, as the control plane would.
type indexed struct {
	mu        sync.Mutex
	index     *policy.Index
	forgotten []netip.AddrPort
}

func (i *indexed) Ask(_ context.Context, dest netip.AddrPort) (bool, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.index.Answer("shop/db", verdict.TCP, dest).Allowed, nil
}

func (i *indexed) Forget(dests []netip.AddrPort) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.forgotten = append(i.forgotten, dests...)
}

// heldPod is a pod with a redirect, somebody who greets where Envoy would listen, and a SYN hold that nothing was told yet.
type heldPod struct {
	*synHold
	asker *indexed
	log   *lines
}

func newHeldPod(t *testing.T) *heldPod {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	podtest.Connect(t)
	p := &heldPod{asker: &indexed{index: policy.NewIndex(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("td.example"),
		PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16"), netip.MustParsePrefix("10.99.0.0/16")}})}, log: newLines()}
	if err := p.asker.index.ApplyAll(objects(8080)); err != nil {
		t.Fatal(err)
	}
	cfg := hold.Defaults()
	v := verdicts.New()
	p.synHold = newSynHold(cfg, p.asker, v, slog.New(slog.NewTextHandler(p.log, nil)))
	if err := shut(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cleanRedirect(t) })
	r, err := netfilter.New(netfilter.ByMark(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "[::]:15001")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "through\n")
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return p
}

// start runs the hold until stop.
func (p *heldPod) start(t *testing.T) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.run(ctx) }()
	stop = sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() { _ = stop() })
	return stop
}

// tell has the control plane say what the cluster is.
func (p *heldPod) tell(t *testing.T, cluster ...string) {
	t.Helper()
	n := &verdict.Network{}
	for _, c := range cluster {
		n.Cluster = append(n.Cluster, netip.MustParsePrefix(c))
	}
	p.tellOf(t, n)
}

func (p *heldPod) tellOf(t *testing.T, n *verdict.Network) {
	t.Helper()
	n.Node = []netip.Addr{netip.MustParseAddr("10.99.0.77")}
	b, err := proto.Marshal(wire.NetworkMessage(n))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.applyNetwork(b); err != nil {
		t.Fatal(err)
	}
}

// decree puts the verdicts of the policy in force.
func (p *heldPod) decree(t *testing.T) {
	t.Helper()
	p.asker.mu.Lock()
	b, err := wire.Marshal(p.asker.index.Verdicts(p.asker.index.Subject("shop/db").Key))
	p.asker.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.applyVerdicts(b); err != nil {
		t.Fatal(err)
	}
}

func (p *heldPod) ready(t *testing.T) {
	t.Helper()
	eventually(t, "the hold", func() bool { return p.Check() == nil })
}

// eventually waits for what tells nobody when it comes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) { //nolint:forbidigo // see above
		if time.Now().After(deadline) {
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// unanswered is long enough for TCP to send a SYN twice.
const unanswered = 1500 * time.Millisecond

// attempt is what connect() says.
func attempt(address string) string {
	c, err := net.DialTimeout("tcp", address, patience)
	switch {
	case err == nil:
		_ = c.Close()
		return "connected"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	}
	return err.Error()
}

func wantAttempts(t *testing.T, when string, want map[string]string) {
	t.Helper()
	for address, say := range want {
		if got := attempt(address); got != say {
			t.Errorf("%s: %s: %s, not %s", when, address, got, say)
		}
	}
}

func change(t *testing.T, do func(c *nftables.Conn)) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	do(conn)
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

// shop/db may connect to 10.99.0.1 and fd99::1 on port 9090. Where these are outside the cluster its verdicts say so, where they are inside nobody
// has the address.
func TestSynHold(t *testing.T) {
	p := newHeldPod(t)
	for _, a := range []string{"10.99.0.1:9090", "[fd99::1]:9090"} {
		if got := attempt(a); got != "refused" {
			t.Errorf("before anything was said: %s: %s", a, got)
		}
	}
	if err := p.Check(); err == nil || !strings.Contains(err.Error(), "not said what the cluster is") {
		t.Errorf("ready: %v", err)
	}
	p.start(t)
	p.tell(t, "10.98.0.0/16", "fd98::/64")
	p.ready(t)
	wantAttempts(t, "before the verdicts", map[string]string{"10.99.0.1:9090": "refused", "[fd99::1]:9090": "refused", "10.99.0.77:1": "connected"})
	p.decree(t)
	outside := map[string]string{"10.99.0.1:9090": "connected", "[fd99::1]:9090": "connected", "10.99.0.1:9091": "refused", "[fd99::1]:9091": "refused"}
	wantAttempts(t, "outside", outside)

	p.tell(t, "10.98.0.0/16", "10.99.0.0/16")
	eventually(t, "the new cluster", func() bool { return attempt("10.99.0.1:9090") == "refused" })
	if got := attempt("[fd99::1]:9090"); got != "connected" { // the new Holder has begun with the verdicts in force
		t.Errorf("fd99::1: %s", got)
	}
	p.ready(t)
	p.tell(t, "10.98.0.0/16")
	eventually(t, "the old cluster", func() bool { return attempt("10.99.0.1:9090") == "connected" })
	wantAttempts(t, "outside again", outside)
}

// TestSynHoldServices: external addresses of services come and go while the hold is at work, and change nothing else.
func TestSynHoldServices(t *testing.T) {
	p := newHeldPod(t)
	p.start(t)
	p.tell(t, "10.98.0.0/16")
	p.ready(t)
	p.decree(t)
	h, _ := p.current()
	outside := map[string]string{"10.99.0.1:9090": "connected", "[fd99::1]:9090": "connected", "10.99.0.1:9091": "refused", "10.99.0.77:9090": "connected", "10.99.0.77:1": "connected"}
	wantAttempts(t, "outside", outside)
	services := &verdict.Network{Cluster: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")},
		Services: []netip.AddrPort{netip.MustParseAddrPort("10.99.0.1:9090"), netip.MustParseAddrPort("10.99.0.77:9090"), netip.MustParseAddrPort("[fd99::1]:1")}}
	p.tellOf(t, services)
	wantAttempts(t, "services", map[string]string{"10.99.0.1:9090": "refused", "10.99.0.77:9090": "refused", "[fd99::1]:9090": "connected", "[fd99::1]:1": "refused", "10.99.0.77:1": "connected"})
	services.Services = services.Services[1:]
	p.tellOf(t, services)
	wantAttempts(t, "one service less", map[string]string{"10.99.0.1:9090": "connected", "10.99.0.77:9090": "refused"})
	if err := p.Check(); err != nil {
		t.Error(err)
	}
	if err := (heldTable{p.synHold}).Repair(); err != nil { // writes them too
		t.Fatal(err)
	}
	wantAttempts(t, "written again", map[string]string{"10.99.0.1:9090": "connected", "10.99.0.77:9090": "refused"})
	p.tell(t, "10.98.0.0/16")
	wantAttempts(t, "outside again", outside)
	if is, _ := p.current(); is != h {
		t.Error("the hold was opened again: what it knew of destinations is lost")
	}
	services.NodePorts = verdict.PortRange{First: 9090, Last: 9090}
	p.tellOf(t, services)
	eventually(t, "another range of node ports", func() bool { return attempt("10.99.0.1:9090") == "refused" })
}

// Whatever happens to the table, what is allowed is so again and what is denied stays denied.
func TestSynHoldRepaired(t *testing.T) {
	p := newHeldPod(t)
	table := &nftables.Table{Name: hold.TableName, Family: nftables.TableFamilyINet}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- netfilter.Guard(ctx, p.logger, heldTable{p.synHold}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	repaired := 0
	repair := func(do func(c *nftables.Conn)) {
		t.Helper()
		change(t, do)
		repaired++
		p.log.await(t, "repair", func(s string) bool { return strings.Count(s, "the table is in place again") >= repaired })
	}
	repair(func(c *nftables.Conn) { c.DelTable(table) }) // nobody has said anything yet: closed
	wantAttempts(t, "shut", map[string]string{"10.99.0.1:9090": "refused", "[fd99::1]:9090": "refused"})
	p.start(t)
	p.tell(t, "10.98.0.0/16", "fd98::/64", "10.99.0.0/24")
	p.decree(t)
	p.ready(t)
	want := map[string]string{"[fd99::1]:9090": "connected", "[fd99::1]:9091": "refused", "10.99.0.1:9090": "refused"}
	wantAttempts(t, "at first", want)
	repair(func(c *nftables.Conn) { c.DelTable(table) })
	wantAttempts(t, "table deleted", want)
	repair(func(c *nftables.Conn) {
		c.InsertRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: "output", Table: table}, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
	})
	wantAttempts(t, "rule in front", want)
	change(t, func(c *nftables.Conn) { c.DelTable(table) })
	p.flip(map[netip.AddrPort]relay.Verdict{netip.MustParseAddrPort("10.99.0.1:9092"): relay.Denied}) // may fail the Holder: the table is not there
	p.log.await(t, "repair, or a new Holder", func(s string) bool {
		return strings.Count(s, "the table is in place again") > repaired || strings.Contains(s, "unknown destinations stay held")
	})
	eventually(t, "the hold", func() bool { return p.Check() == nil })
	wantAttempts(t, "after a failure", want)
}

// Where the hold fails again and again the agent gives up; what was not known before stays closed.
func TestSynHoldGivesUp(t *testing.T) {
	p := newHeldPod(t)
	other, err := hold.Open(hold.Config{Cluster: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16")}, NodePorts: verdict.DefaultNodePorts, ProxyMark: 1, Group: p.cfg.Group, Rate: 1, Patience: 1, MaxQuestions: 1,
		MaxHeld: 1, MaxAllowed: 1, MaxDenied: 1, Idle: patience, ErrorTTL: patience}, p.asker, p.logger)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- other.Run(ctx) }()
	eventually(t, "another listener", other.Running)
	ran := make(chan error, 1)
	go func() { ran <- p.run(context.Background()) }()
	p.tell(t, "10.98.0.0/16", "10.99.0.0/24")
	if err := <-ran; err == nil || !strings.Contains(err.Error(), "in a row") {
		t.Errorf("%v", err)
	}
	if err := p.Check(); err == nil {
		t.Error("it counts as in place")
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	d := net.Dialer{Timeout: unanswered}
	c, err := d.Dial("tcp", "10.99.0.1:9090")
	if err == nil {
		_ = c.Close()
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("an unknown destination: %v", err)
	}
}
