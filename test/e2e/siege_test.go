package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/test/hammer"
	"github.com/mantlet/mantlet/verdict"
)

// contestants are the pods of contested that try, and contestedVIP is the Service of s1.
var contestants = []string{"shop/always", "shop/never", "shop/a", "shop/seesaw", "legacy/plain"}

const contestedVIP = "10.96.3.3"

// siege is a hammer.Siege of the contested servers.
type siege struct {
	*hammer.Siege
	history *hammer.Chronicle
	targets []hammer.Target
}

// lay starts apps in the servers and has all contestants try them without pause.
func lay(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) *siege {
	t.Helper()
	out := &siege{}
	apps := map[string]*hammer.App{}
	for _, name := range []string{"shop/s1", "shop/s2"} {
		p := pod(t, s, name)
		for i, port := range []uint16{8080, 9090} {
			app, err := hammer.NewApp(p, port)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(app.Close)
			key := fmt.Sprintf("%s:%d", name, port)
			apps[key] = app
			out.targets = append(out.targets, hammer.Target{Name: key, Pod: name, App: key, Addr: at(p.Spec().IPs[i].String(), port)})
		}
	}
	out.targets = append(out.targets, hammer.Target{Name: "shop/s1:8080", Pod: "shop/s1", App: "shop/s1:8080", Addr: at(contestedVIP, 80)})
	out.history = hammer.NewChronicle(out.allows(t, m))
	out.Siege = hammer.NewSiege(out.history, apps)
	for _, name := range contestants {
		pause := 10 * time.Millisecond
		if name == "legacy/plain" { // only one sidecar is in its way: it is the first to find a gap
			pause = time.Millisecond
		}
		out.Join(pod(t, s, name), out.targets, pause)
	}
	return out
}

// allows asks the evaluator about all pairs at once.
func (s *siege) allows(t *testing.T, m *source.Manifests) hammer.Allows {
	t.Helper()
	index := policy.NewIndex(policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork})
	if err := index.ApplyAll(&m.Objects); err != nil {
		t.Fatal(err)
	}
	yes := map[string]bool{}
	for _, p := range contestants {
		for _, to := range s.targets {
			d, ok := index.Destination(verdict.TCP, to.Addr)
			if !ok || len(d.Endpoints) != 1 {
				t.Fatalf("%s is %+v, not one endpoint", to.Addr, d)
			}
			if index.Answer(p, verdict.TCP, d.Endpoints[0].Addr).Allowed {
				yes[p+" "+to.Name] = true
			}
		}
	}
	return func(peer, target string) bool { return yes[peer+" "+target] }
}

// lift ends the siege and fails the test for whatever went wrong.
func (s *siege) lift(t *testing.T) *hammer.Tally {
	t.Helper()
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	tally := s.Judge()
	t.Log(tally)
	for _, c := range tally.Complaints {
		t.Error(c)
	}
	return tally
}
