package proxyuser

import (
	"crypto/rand"
	"math"
	"testing"
)

// Whatever the seed, the user is in the range; all of the range is used, by user and group apart.
func TestUser(t *testing.T) {
	for _, r := range []Range{Pod, Mapped, {First: 7, Count: 1}} {
		zero, ones := r.User(Seed{}), Seed{}
		for i := range ones {
			ones[i] = 0xff
		}
		for _, u := range []User{zero, r.User(ones)} {
			if !r.Has(u) {
				t.Errorf("%s is not in %s", u, r)
			}
		}
		if zero.UID != r.First || zero.GID != r.First {
			t.Errorf("%s: the first is %s", r, zero)
		}
	}
	const draws = 20_000
	var quarters [2][4]int
	together := 0
	for range draws {
		var s Seed
		_, _ = rand.Read(s[:])
		u := Pod.User(s)
		if !Pod.Has(u) {
			t.Fatalf("%s is not in %s", u, Pod)
		}
		x, y := (u.UID-Pod.First)/(Pod.Count/4), (u.GID-Pod.First)/(Pod.Count/4)
		quarters[0][x]++
		quarters[1][y]++
		if x == y {
			together++
		}
	}
	// 6 standard deviations of a count with chance 1/4.
	far := 6 * math.Sqrt(draws*0.25*0.75)
	for _, n := range append(append(quarters[0][:], quarters[1][:]...), together) {
		if math.Abs(float64(n)-draws/4) > far {
			t.Errorf("of %d draws %d, not about a quarter: %v, %d", draws, n, quarters, together)
		}
	}
}

func TestRange(t *testing.T) {
	for id, want := range map[int64]bool{-1: false, 0: false, 15150: false, 65534: false, 1_999_999_999: false, 2_000_000_000: true, 2_134_217_727: true, 2_134_217_728: false,
		1<<32 + 2_000_000_000: false} {
		if got := Pod.HasID(id); got != want {
			t.Errorf("%s has %d: %t", Pod, id, got)
		}
	}
	if last := Pod.last(); last > math.MaxInt32 {
		t.Errorf("Kubernetes takes no user %d", last)
	}
	for u, want := range map[User]bool{{Pod.First, Pod.First}: true, {Pod.First, 0}: false, {0, Pod.First}: false} {
		if got := Pod.Has(u); got != want {
			t.Errorf("%s: %t", u, got)
		}
	}
	if Mapped.HasID(1000) || Mapped.HasID(65532) || !Mapped.HasID(30000) || Mapped.last() > 65535 {
		t.Errorf("mapped: %s", Mapped)
	}
}
