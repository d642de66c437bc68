package status

import (
	"slices"
	"testing"
	"time"
)

// A step is with everybody when every replica has it and no sidecar may be without; of several replicas that have signed for one the last counts.
func TestAdopted(t *testing.T) {
	at := func(minutes int) time.Time { return now.Add(time.Duration(minutes) * time.Minute) }
	pod := func(name string, given int, current bool) Pod {
		return Pod{Name: name, UID: "u", Started: true, Sidecar: &Sidecar{Given: at(given), Current: current}}
	}
	known := func(name string) Pod {
		return Pod{Name: name, UID: "u", Started: true, Sidecar: &Sidecar{Connected: true}}
	}
	unborn := pod("shop/p", 0, false)
	unborn.Started = false
	later := pod("shop/p", 9, true)
	later.UID = "another"
	for name, c := range map[string]struct {
		a, b    []Pod
		unheard map[string]string
		behind  []string
		why     string
	}{
		"both":                           {a: []Pod{pod("shop/p", 0, true)}, b: []Pod{known("shop/p")}},
		"nobody knows":                   {a: []Pod{known("shop/p")}, b: []Pod{known("shop/p")}, behind: []string{"shop/p"}},
		"the last was":                   {a: []Pod{pod("shop/p", 5, true)}, b: []Pod{pod("shop/p", 0, false)}},
		"the last was not":               {a: []Pod{pod("shop/p", 0, true)}, b: []Pod{pod("shop/p", 5, false)}, behind: []string{"shop/p"}},
		"clocks do not tell":             {a: []Pod{pod("shop/p", 1, true)}, b: []Pod{pod("shop/p", 0, false)}, behind: []string{"shop/p"}},
		"at about one time, both":        {a: []Pod{pod("shop/p", 1, true)}, b: []Pod{pod("shop/p", 0, true)}},
		"the pod before it of that name": {a: []Pod{later}, b: []Pod{pod("shop/p", 0, false)}, behind: []string{"shop/p"}},
		"no address yet":                 {a: []Pod{unborn}, b: []Pod{unborn}},
		"no sidecar":                     {a: []Pod{{Name: "shop/p", Started: true}}, b: []Pod{{Name: "shop/p", Started: true}}},
		"several":                        {a: []Pod{pod("shop/p", 0, false), pod("shop/q", 0, true), pod("shop/r", 0, false)}, behind: []string{"shop/p", "shop/r"}},
		"one not heard":                  {a: []Pod{pod("shop/p", 0, false)}, unheard: map[string]string{"c": "refused"}, why: "replica c is not heard: refused"},
	} {
		s := Merge([]Report{{Replica: "a", Authority: "f", Pods: c.a}, {Replica: "b", Authority: "f", Pods: c.b}}, c.unheard)
		behind, why := s.Adopted("f")
		// Where the pods of one name are two, the one that counts is the last that connected; nobody did.
		if !slices.Equal(behind, c.behind) || why != c.why {
			t.Errorf("%s: behind %v, %q; want %v, %q", name, behind, why, c.behind, c.why)
		}
		if behind, why := s.Adopted("g"); len(behind) > 0 || why == "" {
			t.Errorf("%s: of another step: %v, %q", name, behind, why)
		}
	}
	s := Merge([]Report{{Replica: "a", Authority: "f"}, {Replica: "b", Authority: "f", Unbundled: []string{"shop"}}}, nil)
	if _, why := s.Adopted("f"); why != "the trust bundle is not in 1 namespace yet (shop)" {
		t.Errorf("%q", why)
	}
	if _, why := Merge(nil, nil).Adopted("f"); why != "no replica is known" {
		t.Errorf("%q", why)
	}
}
