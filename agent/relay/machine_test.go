package relay

import (
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"
)

// world is a machine between a simulated control plane and a simulated Envoy. Messages wait on their ways until a step takes one.
type world struct {
	t     *testing.T
	m     *machine
	plane *simPlane
	envoy *simEnvoy // nil: away

	up      bool // the control plane can be reached
	reopen  bool // the machine has ended the stream
	view    map[netip.AddrPort]bool
	waiting map[netip.AddrPort][]chan answer
	asked   map[netip.AddrPort]bool
	refused map[netip.AddrPort]bool // for want of an answer, as far as the agent knows
	trace   []string
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, plane: newSimPlane(t), up: true, view: map[netip.AddrPort]bool{}, waiting: map[netip.AddrPort][]chan answer{}, asked: map[netip.AddrPort]bool{},
		refused: map[netip.AddrPort]bool{}}
	log := slog.New(slog.DiscardHandler)
	w.m = newMachine(log, newLedger(log))
	w.m.tell = func(news map[netip.AddrPort]Verdict) {
		for dest, v := range news {
			if v == Unknown {
				w.note("told: %s is unknown", dest)
				delete(w.view, dest)
				delete(w.asked, dest)
				delete(w.refused, dest)
				continue
			}
			w.learn(dest, v == Allowed, "told")
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, s := range w.trace[max(0, len(w.trace)-40):] {
				t.Log(s)
			}
		}
	})
	return w
}

const away = "the control plane is away"

func (w *world) note(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
}

// learn is how the agent comes to know an answer.
func (w *world) learn(dest netip.AddrPort, allowed bool, how string) {
	w.note("%s: %s %t", how, dest, allowed)
	w.view[dest] = allowed
	delete(w.refused, dest)
	if allowed && w.envoy != nil && w.m.envoy == w.envoy.side {
		if v := w.envoy.held.of(TypeCluster)[onDemandName(dest)]; !full(v) {
			w.t.Fatalf("%s %s as allowed while envoy holds %q", how, dest, v)
		}
	}
}

func (w *world) answers() {
	for dest, list := range w.waiting {
		w.waiting[dest] = slices.DeleteFunc(list, func(c chan answer) bool {
			select {
			case a := <-c:
				w.learn(dest, a.allowed && a.err == nil, fmt.Sprint("answered ", a.err))
				if a.err != nil && a.err.Error() == away {
					w.refused[dest] = true
				}
				return true
			default:
				return false
			}
		})
	}
}

func (w *world) connect() {
	side := &planeSide{wake: func() {}, end: func() { w.note("the machine ends the stream"); w.reopen = true }}
	w.plane.begin(side)
	w.reopen = false
	w.m.planeComes(side)
}

func (w *world) lose() {
	w.m.planeGoes(w.plane.side)
	w.plane.begin(nil)
}

func (w *world) startEnvoy() {
	e := &simEnvoy{t: w.t, held: versions{}, subscribed: map[string]bool{}, partly: map[string]bool{}}
	e.side = &envoySide{end: func(err error) { w.t.Fatal(err) }, send: func(b []byte) {
		var r deltaResponse
		if err := proto.Unmarshal(b, &r); err != nil {
			w.t.Fatal(err)
		}
		w.note("to envoy: %s", &r)
		w.sees(&r)
		e.ways.down = append(e.ways.down, &r)
	}}
	w.envoy = e
	w.m.envoyComes(e.side)
	e.ask(TypeCluster, "*")
}

// sees checks what is on its way to Envoy.
func (w *world) sees(r *deltaResponse) {
	denied := slices.Clone(r.RemovedResources)
	for _, res := range r.Resources {
		if !full(res.Version) {
			denied = append(denied, res.Name)
		}
	}
	for _, name := range denied {
		e := w.m.kind(TypeCluster).entries[name]
		if r.TypeUrl == TypeCluster && e != nil && e.question != nil && w.asked[e.question.dest] && w.view[e.question.dest] {
			w.t.Fatalf("envoy is told that %s is denied before the agent is", name)
		}
	}
}

func (w *world) killEnvoy() {
	side := w.envoy.side
	w.envoy = nil
	w.m.envoyGoes(side)
}

// carry moves the machine's requests to the control plane's way.
func (w *world) carry() {
	if w.reopen {
		return
	}
	for _, b := range w.m.requests(w.plane.side) {
		var r deltaRequest
		if err := proto.Unmarshal(b, &r); err != nil {
			w.t.Fatal(err)
		}
		w.note("to the control plane: %s", &r)
		w.plane.ways.up = append(w.plane.ways.up, &r)
	}
}

func (w *world) fromEnvoy() {
	r := w.envoy.ways.up[0]
	w.envoy.ways.up = w.envoy.ways.up[1:]
	w.note("from envoy: %s", r)
	parsed, err := parseRequest(marshal(w.t, r))
	if err == nil {
		err = w.m.fromEnvoy(parsed)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) fromPlane() {
	r := w.plane.ways.down[0]
	w.plane.ways.down = w.plane.ways.down[1:]
	w.note("from the control plane: %s", r)
	parsed, err := parseResponse(marshal(w.t, r))
	if err == nil {
		err = w.m.fromPlane(w.plane.side, parsed)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// moves are the steps that carry something on, as they are possible now.
func (w *world) moves() (list []func()) {
	if w.plane.side != nil && !w.reopen {
		if len(w.plane.ways.up) > 0 {
			list = append(list, w.plane.take)
		}
		if len(w.plane.ways.down) > 0 {
			list = append(list, w.fromPlane)
		}
		list = append(list, w.plane.plan, w.carry)
	}
	if w.up && (w.plane.side == nil || w.reopen) {
		list = append(list, w.connect)
	}
	if !w.up && w.plane.side == nil {
		list = append(list, func() { w.m.planeIsDown(away) })
	}
	if w.envoy != nil && len(w.envoy.ways.up) > 0 {
		list = append(list, w.fromEnvoy)
	}
	if w.envoy != nil && len(w.envoy.ways.down) > 0 {
		list = append(list, w.envoy.take)
	}
	return list
}

// settle makes moves until nothing is on its way.
func (w *world) settle() {
	for quiet, n := 0, 0; quiet < 3; n++ {
		if n > 10000 {
			w.t.Fatal("it does not come to rest")
		}
		before := len(w.trace)
		for _, move := range w.moves() {
			move()
			w.check()
		}
		ways := len(w.plane.ways.up) + len(w.plane.ways.down)
		if w.envoy != nil {
			ways += len(w.envoy.ways.up) + len(w.envoy.ways.down)
		}
		if quiet++; len(w.trace) != before || ways > 0 {
			quiet = 0
		}
	}
}

// check is what holds at any time.
func (w *world) check() {
	w.m.tend()
	w.answers()
	for _, k := range w.m.kinds {
		for _, e := range k.entries {
			if poison(version(e.good)) && !e.untried {
				w.t.Fatalf("%s %q: the cache holds what envoy refused", k.url, e.name)
			}
		}
	}
}

// rested is what holds when nothing is on its way and both sides are there.
func (w *world) rested() {
	w.t.Helper()
	for _, kind := range []string{TypeCluster, TypeExtension, TypeListener} {
		for name, v := range w.plane.published[kind] {
			if got := w.envoy.held.of(kind)[name]; got != v && !poison(v) {
				w.t.Errorf("envoy holds %s %q in version %q, not %q", kind, name, got, v)
			}
		}
		for name, v := range w.envoy.held.of(kind) {
			if poison(w.plane.published[kind][name]) || poison(w.plane.resolves[name]) || !onDemand(kind, name) && w.envoy.partly[name] {
				continue // what it applied of a response that it refused the control plane cannot know
			}
			if !onDemand(kind, name) && w.plane.published[kind][name] == "" {
				w.t.Errorf("envoy holds %s %q, which is gone", kind, name)
			}
			if believed := w.plane.acked.of(kind)[name]; believed != v {
				w.t.Errorf("envoy holds %s %q in version %q, and the control plane believes %q", kind, name, v, believed)
			}
			if e := w.m.kind(kind).entries[name]; e == nil || version(e.good) != v {
				w.t.Errorf("envoy holds %s %q in version %q, which is not in the cache", kind, name, v)
			}
		}
	}
	for dest := range w.refused {
		w.t.Errorf("the agent still refuses %s for want of an answer, and the control plane is there", dest)
	}
	clusters := w.m.kind(TypeCluster)
	for dest := range w.asked {
		name := onDemandName(dest)
		e := clusters.entries[name]
		if e == nil || e.question == nil {
			if len(w.waiting[dest]) > 0 {
				w.t.Errorf("%s: a question without an answer", dest)
			}
			continue // it was abandoned
		}
		truth := w.plane.resolves[name]
		if !poison(truth) && w.view[dest] != full(truth) {
			w.t.Errorf("%s is %q, and the agent believes %t", dest, truth, w.view[dest])
		}
		if got := w.envoy.held.of(TypeCluster)[name]; w.view[dest] && !full(got) {
			w.t.Errorf("%s is allowed, and envoy holds %q", dest, got)
		}
		if len(w.waiting[dest]) > 0 {
			w.t.Errorf("%s: a question without an answer", dest)
		}
	}
	for name, e := range clusters.entries {
		if onDemand(TypeCluster, name) && e.question == nil && !e.subscribed && w.envoy.held.of(TypeCluster)[name] == "" {
			w.t.Errorf("the cache keeps %q, which nobody wants: %+v", name, e)
		}
	}
}

func (w *world) ask(dest netip.AddrPort) {
	reply := make(chan answer, 1)
	w.note("ask %s", dest)
	w.asked[dest] = true
	w.waiting[dest] = append(w.waiting[dest], reply)
	w.m.ask(dest, reply)
}

func (w *world) forget(dest netip.AddrPort) {
	if len(w.waiting[dest]) > 0 {
		return
	}
	w.note("forget %s", dest)
	delete(w.asked, dest)
	delete(w.view, dest)
	delete(w.refused, dest)
	w.m.forget([]netip.AddrPort{dest})
}

// leave is for one who waits no longer, and takes that for a denial.
func (w *world) leave(dest netip.AddrPort) {
	list := w.waiting[dest]
	if len(list) == 0 {
		return
	}
	w.note("leave %s", dest)
	w.waiting[dest] = list[1:]
	w.view[dest] = false
	w.refused[dest] = true
	w.m.leave(dest, list[0])
}

// TestRandomInterleavings lets everything happen in every order.
func TestRandomInterleavings(t *testing.T) {
	runs := 150
	if testing.Short() {
		runs = 50
	}
	for seed := range runs {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { randomRun(t, rand.New(rand.NewPCG(uint64(seed), 4))) }) {
			return
		}
	}
}

func randomRun(t *testing.T, rnd *rand.Rand) {
	w := newWorld(t)
	dests := make([]netip.AddrPort, 4)
	for i := range dests {
		dests[i] = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 80)
	}
	dest := func() netip.AddrPort { return dests[rnd.IntN(len(dests))] }
	count := 0
	next := func(like string) string { count++; return fmt.Sprintf("%s%d", like, count) }
	statics := []what{{TypeCluster, "app", ""}, {TypeCluster, "deny", ""}, {TypeListener, "gate", ""}, {TypeListener, "inbound", ""}, {TypeExtension, "rbac", ""}}
	publish := func() {
		s := statics[rnd.IntN(len(statics))]
		switch rnd.IntN(6) {
		case 0:
			delete(w.plane.published.of(s.kind), s.name)
		case 1:
			w.plane.published.of(s.kind)[s.name] = next("poison")
		default:
			w.plane.published.of(s.kind)[s.name] = next("v")
		}
	}
	resolve := func() {
		name := onDemandName(dest())
		switch rnd.IntN(7) {
		case 0:
			delete(w.plane.resolves, name)
		case 1:
			w.plane.resolves[name] = next("full-poison")
		case 2, 3:
			w.plane.resolves[name] = next("empty")
		default:
			w.plane.resolves[name] = next("full")
		}
	}
	for _, s := range statics {
		w.plane.published.of(s.kind)[s.name] = next("v")
	}
	for range 3 {
		resolve()
	}
	events := []func(){
		publish, resolve, resolve,
		func() { w.ask(dest()) }, func() { w.ask(dest()) },
		func() { w.forget(dest()) },
		func() { w.leave(dest()) },
		func() {
			if w.envoy != nil && len(w.envoy.held.of(TypeListener)) > 0 {
				name := onDemandName(dest())
				w.envoy.subscribed[name] = true
				w.envoy.ask(TypeCluster, name)
			}
		},
		func() {
			if w.envoy != nil && rnd.IntN(3) == 0 {
				w.note("envoy is killed")
				w.killEnvoy()
			}
		},
		func() {
			if w.plane.side != nil && !w.reopen && rnd.IntN(3) == 0 {
				w.note("the stream is lost")
				w.lose()
				w.up = rnd.IntN(2) == 0
			}
		},
		func() { w.up = true },
		func() {
			if w.envoy == nil {
				w.startEnvoy()
			}
		},
	}
	for range 150 {
		if rnd.IntN(4) == 0 {
			events[rnd.IntN(len(events))]()
		} else if moves := w.moves(); len(moves) > 0 {
			moves[rnd.IntN(len(moves))]()
		}
		w.check()
	}
	w.up = true
	if w.envoy == nil {
		w.startEnvoy()
	}
	w.settle()
	w.rested()
	if t.Failed() {
		return
	}

	// Nothing is sent again when the control plane comes back, nor, but for what Envoy refuses, when Envoy does.
	w.plane.resources = 0
	w.note("the stream is lost, at rest")
	w.lose()
	w.settle()
	if w.plane.resources > 0 {
		t.Errorf("%d resources were sent again to an envoy that holds them", w.plane.resources)
	}
	w.rested()
	before := maps.Clone(w.view)
	w.note("envoy is killed, at rest")
	w.killEnvoy()
	w.lose()
	w.up = false
	w.startEnvoy()
	w.settle()
	for _, kind := range []string{TypeCluster, TypeExtension, TypeListener} {
		for name, v := range w.plane.published[kind] {
			if got := w.envoy.held.of(kind)[name]; got != v && !poison(v) {
				t.Errorf("without a control plane envoy is given %s %q in version %q, not %q", kind, name, got, v)
			}
		}
	}
	for dest := range w.asked {
		if got := w.envoy.held.of(TypeCluster)[onDemandName(dest)]; before[dest] && !full(got) {
			t.Errorf("without a control plane envoy is given %q for %s, which is allowed", got, dest)
		}
	}
	w.up = true
	w.settle()
	if w.plane.resources > 0 {
		t.Errorf("%d resources were sent again to an envoy that had them from the cache", w.plane.resources)
	}
	w.rested()
}
