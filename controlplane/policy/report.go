package policy

import (
	"slices"
	"strings"
	"time"

	"github.com/mantlet/mantlet/verdict"
)

// Held is a NetworkPolicy as the Index holds it.
type Held struct {
	Name       string // "namespace/name"
	UID        string
	Generation int64 // metadata.generation, which grows with each change of the spec; zero for manifests
	Created    time.Time
	Pods       []string // that it selects, "namespace/name", sorted
	Problems   []string // what is wrong in it, and so closed
}

// Policies lists the policies that are held, by name.
func (x *Index) Policies() []Held {
	var out []Held
	for _, ns := range x.namespaces {
		for _, p := range ns.policies {
			h := p.Held
			for _, pod := range ns.pods {
				if p.pods.matches(pod.labels) {
					h.Pods = append(h.Pods, pod.key)
				}
			}
			slices.Sort(h.Pods)
			h.Problems = slices.Clone(p.problems)
			out = append(out, h)
		}
	}
	slices.SortFunc(out, func(a, b Held) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Modes are the modes of all namespaces in which there are pods or policies.
func (x *Index) Modes() map[string]verdict.Mode {
	out := map[string]verdict.Mode{}
	for name, ns := range x.namespaces {
		if len(ns.pods)+len(ns.policies) > 0 {
			out[name], _ = x.modeOf(ns)
		}
	}
	return out
}
