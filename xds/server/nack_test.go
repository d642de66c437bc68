package server_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mantlet/mantlet/xds/server"
)

func TestNackOfOneResource(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "good"), cds(t, "app", "1")))
	s := b.connect(t, "ns/a")
	s.ask("cds")
	s.gets("cds +app")
	s.ask("lds")
	s.gets("lds +in")
	s.silent()

	b.Publish("ns/a", set(t, lds(t, "in", "bad"), cds(t, "app", "1")))
	s.nack(s.wants("lds +in"), "no such extension")
	s.silent()
	if got, want := b.status("ns/a"), "cds app in force; lds in refused: no such extension"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if l := b.log.String(); !strings.Contains(l, "resource=in") || !strings.Contains(l, "no such extension") {
		t.Errorf("the log names not the resource and the reason:\n%s", l)
	}
	if !b.Ledger().InForce("ns/a", lds(t, "in", "good")) || b.Ledger().InForce("ns/a", lds(t, "in", "bad")) {
		t.Error("the previous version should stay in force")
	}

	b.Publish("ns/a", set(t, lds(t, "in", "bad"), cds(t, "app", "2"))) // other types and later pushes go on
	s.gets("cds +app")
	s.silent() // never again with the same bytes
	b.Publish("ns/a", set(t, lds(t, "in", "good"), cds(t, "app", "2")))
	s.silent() // the client has that already
	if err := b.Ledger().Wait(within(t, 10*time.Second), "ns/a"); err != nil {
		t.Errorf("back at what is in force: %v", err)
	}
	b.Publish("ns/a", set(t, lds(t, "in", "bad"), cds(t, "app", "2")))
	s.silent()
	b.Publish("ns/a", set(t, lds(t, "in", "worse"), cds(t, "app", "2")))
	s.nack(s.wants("lds +in"), "worse")
	b.Publish("ns/a", set(t, lds(t, "in", "bad"), cds(t, "app", "2")))
	s.silent() // the version before the last is not forgotten either
	b.Publish("ns/a", set(t, lds(t, "in", "better"), cds(t, "app", "2")))
	s.gets("lds +in") // a new version is sent at once
}

func TestNackThatNamesResources(t *testing.T) {
	for name, c := range map[string]struct {
		typ, reason string
		refused     []string
	}{
		"listener":        {"lds", "Error adding/updating listener(s) b: malformed address", []string{"b"}},
		"listeners":       {"lds", "Error adding/updating listener(s) b: x\nc: y\n", []string{"b", "c"}},
		"cluster":         {"cds", "Error adding/updating cluster(s) b: a: nothing to do with it", []string{"b"}},
		"clusters":        {"cds", "Error adding/updating cluster(s) a: x, c: y", []string{"a", "c"}},
		"on demand":       {"cds", "Error adding/updating cluster c - c: x", []string{"c"}},
		"mentioned":       {"cds", "Error adding/updating cluster(s) a: like b: c", []string{"a"}},
		"name in a name":  {"lds", "Error adding/updating listener(s) bb: x", nil},
		"another message": {"cds", "Proto constraint validation failed: b: x", nil},
	} {
		t.Run(name, func(t *testing.T) {
			b := start(t, nil)
			b.Publish("ns/a", set(t, lds(t, "a", ""), lds(t, "b", ""), lds(t, "c", ""), cds(t, "a", ""), cds(t, "b", ""), cds(t, "c", "")))
			s := b.connect(t, "ns/a")
			s.ask(c.typ)
			s.nack(s.wants(c.typ+" +a +b +c"), c.reason)
			if c.refused == nil { // each alone, and one convicts itself
				s.gets(c.typ + " +a")
				s.nack(s.wants(c.typ+" +b"), c.reason)
				s.gets(c.typ + " +c")
				c.refused = []string{"b"}
				s.silent()
				b.Publish("ns/a", set(t, lds(t, "a", "2"), lds(t, "b", ""), lds(t, "c", "2"), cds(t, "a", "2"), cds(t, "b", ""), cds(t, "c", "2")))
				s.gets(c.typ + " +a +c") // together again
			} else { // the others once more, for Envoy remembers no version of a rejected response
				rest := c.typ
				for _, n := range []string{"a", "b", "c"} {
					if !strings.Contains(fmt.Sprint(c.refused), n) {
						rest += " +" + n
					}
				}
				s.gets(rest)
			}
			s.silent()
			cs, _ := b.Ledger().Status("ns/a")
			for _, r := range cs.Resources {
				if shortType(r.Type) != c.typ {
					continue
				}
				if want := strings.Contains(fmt.Sprint(c.refused), r.Name); want != (r.Refusal != nil) || want == r.InForce {
					t.Errorf("%s: refused %v, in force %v, want refused: %v", r.Name, r.Refusal != nil, r.InForce, want)
				}
			}
		})
	}
}

func TestNackOutlivesTheStreamButNotTheProcess(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "good")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	held := holds(s.gets("lds +in"))
	b.Publish("ns/a", set(t, lds(t, "in", "bad")))
	s.nack(s.wants("lds +in"), "no")
	s.silent()
	s.cancel()

	s = b.connect(t, "ns/a")
	s.resume("lds", held)
	s.gets("lds") // the same Envoy: not again
	s.silent()
	if got := b.status("ns/a"); got != "lds in refused: no" {
		t.Errorf("after the reconnect: %q", got)
	}
	if !b.Ledger().InForce("ns/a", lds(t, "in", "good")) {
		t.Error("the client says that it holds the good version")
	}
	s.cancel()
	away(t, b, "ns/a")
	if b.Ledger().InForce("ns/a", lds(t, "in", "good")) {
		t.Error("in force in a sidecar that is away")
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Ledger().Wait(ended, "ns/a"); !errors.Is(err, server.ErrNotConnected) {
		t.Errorf("wait for a client that is away: %v", err)
	}

	s = b.connect(t, "ns/a")
	s.ask("lds")
	s.gets("lds +in") // a fresh one, that holds nothing: it may well take it
	s.silent()
	if got := b.status("ns/a"); got != "lds in in force" {
		t.Errorf("after the restart: %q", got)
	}
}

func TestNackOfARemoval(t *testing.T) {
	b := start(t, nil)
	b.Publish("ns/a", set(t, lds(t, "in", "1")))
	s := b.connect(t, "ns/a")
	s.ask("lds")
	s.gets("lds +in")
	s.silent()
	b.Publish("ns/a", server.Set{})
	s.nack(s.wants("lds -in"), "in use")
	s.silent() // not again
	if got := b.status("ns/a"); got != "lds in refused: in use" {
		t.Errorf("got %q", got)
	}
	b.Publish("ns/a", set(t, lds(t, "in", "2")))
	s.gets("lds +in")
	s.silent()
	b.Publish("ns/a", server.Set{})
	s.gets("lds -in")
	s.silent()
	if got := b.status("ns/a"); got != "" {
		t.Errorf("got %q", got)
	}
}

func TestInnocentAnswersInARefusedResponseAreGivenAgain(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "1"))
	b.od.set("od|b", cds(t, "od|b", "bad"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|a")
	s.gets("cds +od|a")
	s.silent()
	s.ask("cds", "od|a", "od|b")
	s.nack(s.wants("cds +od|a +od|b"), "no")
	s.gets("cds +od|a") // held, but asked for
	s.gets("cds +od|b")
}

func TestNackOnDemandIsAnswered(t *testing.T) {
	b := start(t, nil)
	b.od.set("od|a", cds(t, "od|a", "bad"))
	b.Publish("ns/a", server.Set{})
	s := b.connect(t, "ns/a")
	s.ask("cds", "od|a")
	s.nack(s.wants("cds +od|a"), "no")
	s.silent()
	s.ask("cds", "od|a") // asks again: it must not wait for bytes that never come
	s.gets("cds -od|a")
	s.silent()
	if got := b.status("ns/a"); got != "cds od|a refused: no" {
		t.Errorf("an answer that there is nothing confirms nothing: %q", got)
	}
	b.od.set("od|a", cds(t, "od|a", "good"))
	b.Refresh("ns/a", "od|a")
	s.gets("cds +od|a")
}
