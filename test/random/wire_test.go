package random

import (
	"math/rand/v2"
	"testing"

	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict/wire"
)

// TestVerdictsSurviveTheWire wants that what any compiled verdicts say arrives at the agent, and that no reader refuses them.
func TestVerdictsSurviveTheWire(t *testing.T) {
	subjects := 0
	for i := range *worlds {
		s := *seed + uint64(i)
		x, err := indexOf(oracle.Generate(rand.New(rand.NewPCG(s, 0)), oracle.Small))
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range x.SubjectKeys() {
			want := x.Verdicts(key)
			b, err := wire.Marshal(want)
			if err != nil {
				t.Fatal(err)
			}
			got, err := wire.Unmarshal(b)
			if err != nil {
				t.Fatalf("world %d, subject %s: %v\n%s", s, key, err, asYAML(want))
			}
			if got.Hash() != want.Hash() { // of every field
				t.Fatalf("world %d, subject %s: sent\n%s\narrived\n%s", s, key, asYAML(want), asYAML(got))
			}
			subjects++
		}
	}
	if subjects < *worlds {
		t.Errorf("%d subjects in %d worlds", subjects, *worlds)
	}
}
