package status

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Adopted says whether a step of a rotation of the root is with everybody: sidecars that may not have what the authority with a fingerprint gives (roots
// included), "namespace/name", sorted; and in words what else is in the way, "" for nothing. Where something else is, the sidecars are not known.
//
// A sidecar that has not got any address yet is left out: it begins with the trust bundle of its namespace.
func (s Status) Adopted(fingerprint string) (behind []string, otherwise string) {
	if len(s.Replicas) == 0 {
		return nil, "no replica is known"
	}
	var why []string
	unbundled := map[string]bool{}
	for _, r := range s.Replicas {
		switch {
		case r.Error != "":
			why = append(why, fmt.Sprintf("replica %s is not heard: %s", r.Name, r.Error))
		case r.Authority != fingerprint:
			why = append(why, fmt.Sprintf("replica %s has not taken over the secret yet", r.Name))
		}
		for _, namespace := range r.Unbundled {
			unbundled[namespace] = true
		}
	}
	if len(unbundled) > 0 {
		why = append(why, fmt.Sprintf("the trust bundle is not in %s yet (%s)", count(len(unbundled), "namespace"), named(slices.Sorted(maps.Keys(unbundled)))))
	}
	if len(why) > 0 {
		return nil, strings.Join(why, "; ")
	}
	for _, c := range s.Sidecars {
		if c.Started && !c.Current {
			behind = append(behind, c.Pod)
		}
	}
	return behind, ""
}
