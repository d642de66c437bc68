package netfilter

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"go.uber.org/goleak"
)

func TestCheck(t *testing.T) {
	tamper := map[string]struct {
		change func(c *nftables.Conn)
		want   string
	}{
		"table deleted": {func(c *nftables.Conn) { c.DelTable(table()) }, "is gone"},
		"rules flushed": {func(c *nftables.Conn) { c.FlushTable(table()) }, "0 rules"},
		"chain flushed": {func(c *nftables.Conn) { c.FlushChain(&nftables.Chain{Name: "output", Table: table()}) }, "chain output: it has 0 rules"},
		"rule in front": {func(c *nftables.Conn) {
			c.InsertRule(&nftables.Rule{Table: table(), Chain: &nftables.Chain{Name: "output", Table: table()},
				Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}})
		}, "rules, not"},
		"chain added": {func(c *nftables.Conn) { c.AddChain(&nftables.Chain{Name: "more", Table: table()}) }, "4 chains"},
		"other port": {func(c *nftables.Conn) {
			other := ByMark()
			other.OutboundPort++
			c.DelTable(table())
			c.AddTable(table())
			addTimeouts(c)
			for _, w := range other.chains() {
				c.AddChain(w.Chain)
				for _, e := range w.Rules {
					c.AddRule(&nftables.Rule{Table: w.Table, Chain: w.Chain, Exprs: e})
				}
			}
		}, "chain output: rule 3"},
	}
	for name, tt := range tamper {
		t.Run(name, func(t *testing.T) {
			r := apply(t)
			if err := r.Check(); err != nil {
				t.Fatalf("as written: %v", err)
			}
			conn, err := nftables.New()
			if err != nil {
				t.Fatal(err)
			}
			tt.change(conn)
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
			if err := r.Check(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			if err := r.Apply(); err != nil {
				t.Fatal(err)
			}
			if err := r.Check(); err != nil {
				t.Errorf("written again: %v", err)
			}
		})
	}
}

// awaited is a log that tells when a line with the wanted text comes.
type awaited struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	want string
	seen chan struct{}
}

func (a *awaited) Write(b []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.buf.Write(b)
	if strings.Contains(string(b), a.want) {
		select {
		case a.seen <- struct{}{}:
		default:
		}
	}
	return len(b), nil
}

func TestGuardRepairs(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	log := &awaited{want: "the table is in place again", seen: make(chan struct{}, 1)}
	r, err := New(ByMark(), slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Remove()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Guard(ctx, r.logger, r) }()
	<-log.seen // there was no table at all
	for range 3 {
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		conn.FlushRuleset()
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
		<-log.seen
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := r.Check(); err != nil {
		t.Error(err)
	}
}

func TestRemoveIsIdempotent(t *testing.T) {
	r := apply(t)
	for range 2 {
		if err := r.Remove(); err != nil {
			t.Error(err)
		}
	}
	if err := r.Check(); err == nil {
		t.Error("check passed without a table")
	}
}

func TestNewRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no port":  {Mark: 1},
		"one port": {InboundPort: 1, OutboundPort: 1, Mark: 1},
		"no mark":  {InboundPort: 1, OutboundPort: 2},
	} {
		if _, err := New(cfg, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
