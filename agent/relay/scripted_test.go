package relay

import "testing"

// settled is a world whose Envoy holds the cluster of dest, which the agent has asked about.
func settled(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.plane.published.of(TypeCluster)["app"] = "v1"
	w.plane.resolves[onDemandName(dest)] = "full1"
	w.startEnvoy()
	w.ask(dest)
	w.settle()
	w.holds("full1")
	if !w.view[dest] {
		t.Fatal("not allowed")
	}
	return w
}

// holds wants Envoy to hold a version of the cluster of dest.
func (w *world) holds(want string) {
	w.t.Helper()
	if got := w.envoy.held.of(TypeCluster)[onDemandName(dest)]; got != want {
		w.t.Fatalf("envoy holds %q, want %q", got, want)
	}
}

// exchange carries what the machine asks to the control plane, and its answers back; what is for Envoy stays on its way.
func (w *world) exchange() {
	w.carry()
	for len(w.plane.ways.up) > 0 {
		w.plane.take()
	}
	w.plane.plan()
	for len(w.plane.ways.down) > 0 {
		w.fromPlane()
	}
	w.check()
}

// What is forgotten leaves Envoy, and when it is asked about again the answer waits until it is back, not for the one that Envoy held.
func TestForgottenAndAskedAgain(t *testing.T) {
	w := settled(t)
	w.forget(dest)
	w.exchange() // the control plane says that it is gone
	w.ask(dest)
	w.exchange()
	w.exchange()
	if n := len(w.envoy.ways.down); n != 2 {
		t.Errorf("%d responses are on their way to envoy, not removal and cluster", n)
	}
	if len(w.waiting[dest]) != 1 {
		t.Error("answered before envoy has it again")
	}
	w.settle()
	w.rested()
	w.holds("full1")
	w.forget(dest)
	w.settle()
	w.holds("")
	if e := w.m.kind(TypeCluster).entries[onDemandName(dest)]; e != nil {
		t.Errorf("still known: %+v", e)
	}
}

// Envoy refuses a response in which something was denied, and may have applied that: it is denied until it has ACKed something newer.
func TestDenialInARefusedResponse(t *testing.T) {
	w := settled(t)
	w.plane.published.of(TypeCluster)["app"] = "poison"
	w.plane.resolves[onDemandName(dest)] = "empty2"
	w.exchange()
	w.envoy.take()
	w.fromEnvoy()
	w.plane.resolves[onDemandName(dest)] = "full-poison3" // before it could be sent once more
	w.settle()
	if w.view[dest] {
		t.Error("believed to be allowed, and envoy holds what it applied of the refused response")
	}
	w.holds("") // it was told to let go of that
	w.ask(dest)
	w.settle()
	if w.view[dest] {
		t.Error("believed to be allowed, and envoy has refused the cluster")
	}
	w.plane.resolves[onDemandName(dest)] = "full4"
	w.settle()
	w.ask(dest)
	w.settle()
	if w.holds("full4"); !w.view[dest] {
		t.Error("still denied")
	}
}

// What is denied and comes to be admitted costs Envoy nothing before somebody connects there: it is told as unknown, and no longer followed.
func TestAdmittedAfterADenial(t *testing.T) {
	w := settled(t)
	w.plane.resolves[onDemandName(dest)] = "empty2"
	w.settle()
	w.holds("")
	if allowed, known := w.view[dest]; allowed || !known {
		t.Errorf("allowed %t, known %t", allowed, known)
	}
	w.rested()
	w.plane.resolves[onDemandName(dest)] = "full3"
	w.settle()
	if _, known := w.view[dest]; known {
		t.Error("the agent still believes the denial")
	}
	w.holds("")
	if e := w.m.kind(TypeCluster).entries[onDemandName(dest)]; e != nil {
		t.Errorf("still known: %+v", e)
	}
	w.ask(dest)
	w.settle()
	if w.holds("full3"); !w.view[dest] {
		t.Error("asked again, and denied")
	}
	w.rested()
}

// What Envoy was given because the one before it had asked for it is followed like what it asked for.
func TestInheritedClusterIsFollowed(t *testing.T) {
	w := newWorld(t)
	w.plane.published.of(TypeCluster)["app"] = "v1"
	w.plane.resolves[onDemandName(dest)] = "full1"
	w.startEnvoy()
	w.settle()
	w.envoy.ask(TypeCluster, onDemandName(dest))
	w.settle()
	w.killEnvoy()
	w.startEnvoy()
	w.settle()
	w.holds("full1")
	w.plane.resolves[onDemandName(dest)] = "full2"
	w.settle()
	w.holds("full2")
	w.lose()
	w.plane.resolves[onDemandName(dest)] = "full3"
	w.settle()
	w.holds("full3")
	w.plane.resolves[onDemandName(dest)] = "empty4"
	w.settle()
	w.holds("")
	if e := w.m.kind(TypeCluster).entries[onDemandName(dest)]; e != nil {
		t.Errorf("nobody asks for it, and still known: %+v", e)
	}
	w.envoy.ask(TypeCluster, onDemandName(dest))
	w.settle()
	w.holds("empty4")
}

// Envoy asks for a cluster that it is just being told to let go of, because the pod may not connect there any more: it gets the one without
// endpoints, and closes connections at once.
func TestAskedForWhileItIsDenied(t *testing.T) {
	w := settled(t)
	w.plane.resolves[onDemandName(dest)] = "empty2"
	w.exchange()
	w.envoy.ask(TypeCluster, onDemandName(dest))
	w.fromEnvoy()
	w.settle()
	w.holds("empty2")
	w.rested()
	w.plane.resolves[onDemandName(dest)] = "full3"
	w.settle()
	w.holds("full3")
	w.rested()
}

// Envoy asks for a cluster while a newer version of it is on its way: it is not sent the older one after that.
func TestAskedForWhileANewerOneIsOnItsWay(t *testing.T) {
	w := settled(t)
	w.plane.resolves[onDemandName(dest)] = "full2"
	w.exchange()
	w.envoy.ask(TypeCluster, onDemandName(dest))
	w.fromEnvoy()
	if n := len(w.envoy.ways.down); n != 1 {
		t.Errorf("%d responses are on their way to envoy", n)
	}
	w.settle()
	w.holds("full2")
	w.rested()
}

// What a control plane sends once more though Envoy holds it, Envoy is not bothered with.
func TestSentOnceMore(t *testing.T) {
	w := settled(t)
	w.plane.kinds[TypeCluster].due["app"] = true
	w.exchange()
	if n := len(w.envoy.ways.down); n != 0 {
		t.Errorf("%d responses are on their way to envoy", n)
	}
	w.settle()
	w.rested()
}
