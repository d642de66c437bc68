package policy

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

// TestSet holds a set against a map.
func TestSet(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var s set[int]
		want := map[int]struct{}{}
		most := 1 + random.IntN(2*mostFew)
		for range 60 {
			v := random.IntN(most)
			if random.IntN(3) == 0 {
				s.remove(v)
				delete(want, v)
			} else {
				s.add(v)
				want[v] = struct{}{}
			}
			if got := slices.Sorted(s.all()); !slices.Equal(got, slices.Sorted(maps.Keys(want))) || s.len() != len(want) {
				t.Fatalf("%v with %d, want %v", got, s.len(), want)
			}
			if _, is := want[v]; s.has(v) != is {
				t.Fatalf("has %d: %t", v, !is)
			}
		}
	}
	m := map[string]set[int]{}
	add(m, "a", 1)
	add(m, "a", 2)
	remove(m, "a", 1)
	if s := m["a"]; s.len() != 1 || !s.has(2) {
		t.Errorf("left are %v", slices.Collect(s.all()))
	}
	if remove(m, "a", 2); len(m) != 0 {
		t.Error("an empty set is kept")
	}
}
