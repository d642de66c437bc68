package hammer

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// Arena is a Siege of the servers of Contested by its Contestants.
type Arena struct {
	*Siege
	History            *Chronicle
	Targets, Datagrams []Target
	config             policy.Config
	apps               []*App
}

// Enter starts apps in the servers of a sandbox that runs Contested, perhaps with more, and has all Contestants try them without pause.
func Enter(s *sandbox.Sandbox, m *source.Manifests, config policy.Config) (_ *Arena, err error) {
	a := &Arena{config: config}
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	apps := map[string]*App{}
	for _, name := range []string{"shop/s1", "shop/s2"} {
		p, ok := s.Pod(name)
		if !ok || len(p.Spec().IPs) != 2 {
			return nil, fmt.Errorf("pod %s: it is not there with an address of each family", name)
		}
		for i, port := range []uint16{8080, 9090} {
			app, err := NewApp(p, port)
			if err != nil {
				return nil, err
			}
			a.apps = append(a.apps, app)
			key := fmt.Sprintf("%s:%d", name, port)
			apps[key] = app
			a.aim(name, key, netip.AddrPortFrom(p.Spec().IPs[i], port))
		}
	}
	a.aim("shop/s1", "shop/s1:8080", netip.AddrPortFrom(netip.MustParseAddr(ContestedVIP), 80))
	first, err := a.Allows(m)
	if err != nil {
		return nil, err
	}
	a.History = NewChronicle(first)
	a.Siege = NewSiege(a.History, apps)
	for _, name := range Contestants {
		p, ok := s.Pod(name)
		if !ok {
			return nil, fmt.Errorf("pod %s: it is not there", name)
		}
		pause := 10 * time.Millisecond
		if name == "legacy/plain" { // only one sidecar is in its way: it is the first to find a gap
			pause = time.Millisecond
		}
		a.Join(p, a.Targets, pause)
		a.Join(p, a.Datagrams, pause)
	}
	return a, nil
}

// aim makes an address of an app a target, for connections and for datagrams.
func (a *Arena) aim(pod, app string, to netip.AddrPort) {
	a.Targets = append(a.Targets, Target{Name: app, Pod: pod, App: app, Protocol: verdict.TCP, Addr: to})
	a.Datagrams = append(a.Datagrams, Target{Name: app + "/UDP", Pod: pod, App: app, Protocol: verdict.UDP, Addr: to})
}

// Open starts one more app, which no Contestant tries: for streams. It returns its addresses as targets.
func (a *Arena) Open(pod *netns.Pod, port uint16) ([]Target, error) {
	app, err := NewApp(pod, port)
	if err != nil {
		return nil, err
	}
	a.apps = append(a.apps, app)
	key := fmt.Sprintf("%s:%d", pod.Name(), port)
	a.serve(key, app)
	var out []Target
	for _, ip := range pod.Spec().IPs {
		out = append(out, Target{Name: pod.Name(), Pod: pod.Name(), App: key, Protocol: verdict.TCP, Addr: netip.AddrPortFrom(ip, port)})
	}
	return out, nil
}

// Allows asks the evaluator about all Contestants and targets at once.
func (a *Arena) Allows(m *source.Manifests) (Allows, error) {
	index := policy.NewIndex(a.config)
	if err := index.ApplyAll(&m.Objects); err != nil {
		return nil, err
	}
	yes := map[string]bool{}
	for _, p := range Contestants {
		for _, to := range slices.Concat(a.Targets, a.Datagrams) {
			d, ok := index.Destination(to.Protocol, to.Addr)
			if !ok || len(d.Endpoints) != 1 {
				return nil, fmt.Errorf("%s is %+v, not one endpoint", to.Addr, d)
			}
			if index.Answer(p, to.Protocol, d.Endpoints[0].Addr).Allowed {
				yes[p+" "+to.Name] = true
			}
		}
	}
	return func(peer, target string) bool { return yes[peer+" "+target] }, nil
}

// Close ends the siege and the apps.
func (a *Arena) Close() {
	if a.Siege != nil {
		_ = a.Stop()
	}
	for _, app := range a.apps {
		app.Close()
	}
}
