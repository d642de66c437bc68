package retired

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity"
)

// What a Secret may hold, in bytes of its keys and values. The API server takes 1 MiB.
const (
	mostOfNamespace = 48 << 10
	mostOfAll       = 512 << 10
)

// state is what is retired.
type state struct {
	pods  map[string]record // by UID
	bound map[string]bound  // by namespace; "": all
}

// record is what a pod was.
type record struct {
	Pod        string                    `json:"pod"` // "namespace/name"
	Addresses  []netip.Addr              `json:"addresses"`
	Identities map[spiffeid.ID]time.Time `json:"identities"` // until when each is refused from there
}

// bound is a policy.Binding.
type bound struct {
	Until time.Time `json:"until"`
	Why   string    `json:"why"`
}

func newState() state { return state{pods: map[string]record{}, bound: map[string]bound{}} }

func (s state) clone() state {
	out := newState()
	out.merge(s)
	return out
}

// A Secret's key is a pod's UID, or names what is bound. UIDs are UUIDs, and have no dot.
var uid = regexp.MustCompile(`^[0-9A-Za-z-]{1,64}$`)

const (
	namespaceKey = "namespace."
	clusterKey   = "all.namespaces"
)

// covers reports whether a Retirement says nothing new.
func (s state) covers(r policy.Retirement) bool {
	is := s.pods[r.UID]
	until, ok := is.Identities[r.ID]
	return ok && !until.Before(r.Until) && !slices.ContainsFunc(r.Addrs, func(a netip.Addr) bool { return !slices.Contains(is.Addresses, a) })
}

// add takes a Retirement over: of two that speak of one pod and identity the later end holds.
func (s state) add(r policy.Retirement) {
	namespace, _, _ := strings.Cut(r.Pod, "/")
	if !uid.MatchString(r.UID) {
		s.bind(namespace, bound{r.Until, fmt.Sprintf("pod %s has a UID that cannot be written down", r.Pod)})
		return
	}
	s.put(r.UID, record{r.Pod, r.Addrs, map[spiffeid.ID]time.Time{r.ID: r.Until}})
}

func (s state) put(uid string, r record) {
	is := s.pods[uid]
	out := record{Pod: r.Pod, Identities: maps.Clone(is.Identities)}
	if out.Identities == nil {
		out.Identities = map[spiffeid.ID]time.Time{}
	}
	for id, until := range r.Identities {
		if until = until.UTC(); until.After(out.Identities[id]) {
			out.Identities[id] = until
		}
	}
	out.Addresses = slices.Concat(is.Addresses, r.Addresses)
	slices.SortFunc(out.Addresses, netip.Addr.Compare)
	out.Addresses = slices.Compact(out.Addresses)
	s.pods[uid] = out
}

func (s state) bind(namespace string, b bound) {
	if is, ok := s.bound[namespace]; !ok || b.Until.After(is.Until) {
		b.Until = b.Until.UTC()
		s.bound[namespace] = b
	}
}

func (s state) merge(o state) {
	for uid, r := range o.pods {
		s.put(uid, r)
	}
	for namespace, b := range o.bound {
		s.bind(namespace, b)
	}
}

// expire drops what has ended by a time, and returns when the next will have; zero: nothing is left.
func (s state) expire(by time.Time) (next time.Time) {
	stays := func(until time.Time) bool {
		if !until.After(by) {
			return false
		}
		if next.IsZero() || until.Before(next) {
			next = until
		}
		return true
	}
	for uid, r := range s.pods {
		maps.DeleteFunc(r.Identities, func(_ spiffeid.ID, until time.Time) bool { return !stays(until) })
		if len(r.Identities) == 0 {
			delete(s.pods, uid)
		}
	}
	maps.DeleteFunc(s.bound, func(_ string, b bound) bool { return !stays(b.Until) })
	return next
}

// fold keeps a state within its bounds. A namespace that has too much is bound instead, until the last of it ends, and so are those that have most
// where all together have too much: whoever fills the Secret pays with more refusals for their own namespace, and pushes nobody else out.
func (s state) fold() error {
	sizes := map[string]int{}
	total := 0
	for uid, r := range s.pods {
		text, err := json.Marshal(r)
		if err != nil {
			return err
		}
		namespace, _, _ := strings.Cut(r.Pod, "/")
		sizes[namespace] += len(uid) + len(text)
		total += len(uid) + len(text)
	}
	for namespace, b := range s.bound {
		total += len(namespaceKey) + len(namespace) + len(b.Why) + 64
	}
	largest := slices.SortedFunc(maps.Keys(sizes), func(a, b string) int { return cmp.Or(sizes[b]-sizes[a], strings.Compare(a, b)) })
	for _, namespace := range largest {
		if sizes[namespace] <= mostOfNamespace && total <= mostOfAll {
			return nil
		}
		total += s.foldNamespace(namespace, "its pods were relabelled too often to write each down") - sizes[namespace]
	}
	if total > mostOfAll {
		until := time.Time{}
		for _, b := range s.bound {
			if b.Until.After(until) {
				until = b.Until
			}
		}
		clear(s.bound)
		s.bind("", bound{until, "too many namespaces have pods that were relabelled too often to write each down"})
	}
	return nil
}

// foldNamespace returns how many bytes the namespace takes then.
func (s state) foldNamespace(namespace, why string) int {
	b := bound{Why: why}
	for uid, r := range s.pods {
		if !strings.HasPrefix(r.Pod, namespace+"/") {
			continue
		}
		for _, until := range r.Identities {
			if until.After(b.Until) {
				b.Until = until
			}
		}
		delete(s.pods, uid)
	}
	s.bind(namespace, b)
	return len(namespaceKey) + len(namespace) + len(why) + 64
}

// encode is a Secret's data: the same state is the same bytes.
func (s state) encode() (map[string][]byte, error) {
	out := map[string][]byte{}
	var errs []error
	put := func(key string, v any) {
		text, err := json.Marshal(v)
		errs = append(errs, err)
		out[key] = text
	}
	for uid, r := range s.pods {
		put(uid, r)
	}
	for namespace, b := range s.bound {
		if namespace == "" {
			put(clusterKey, b)
		} else {
			put(namespaceKey+namespace, b)
		}
	}
	return out, errors.Join(errs...)
}

// decode reads a Secret's data. What cannot be read is an error, and stands for the worst that it may have said: every namespace is bound until a
// time.
func decode(data map[string][]byte, worst time.Time) (state, []error) {
	s := newState()
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(data)) {
		if err := s.read(key, data[key]); err != nil {
			err = fmt.Errorf("key %s: %w", key, err)
			errs = append(errs, err)
			s.bind("", bound{worst, fmt.Sprintf("what was retired could not be read: %v", err)})
		}
	}
	return s, errs
}

func (s state) read(key string, text []byte) error {
	namespace, isNamespace := strings.CutPrefix(key, namespaceKey)
	switch {
	case key == clusterKey:
		namespace = ""
	case isNamespace && len(validation.IsDNS1123Label(namespace)) == 0:
	case uid.MatchString(key):
		var r record
		if err := strictly(text, &r); err != nil {
			return err
		}
		if err := r.check(); err != nil {
			return err
		}
		s.put(key, r)
		return nil
	default:
		return errors.New("neither a pod's UID nor a namespace's")
	}
	var b bound
	if err := strictly(text, &b); err != nil {
		return err
	}
	if b.Until.IsZero() {
		return errors.New("until: missing")
	}
	s.bind(namespace, b)
	return nil
}

func strictly(text []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if d.More() {
		return errors.New("something follows the object")
	}
	return nil
}

func (r record) check() error {
	namespace, name, ok := strings.Cut(r.Pod, "/")
	switch {
	case !ok || namespace == "" || name == "":
		return fmt.Errorf("pod: %q is not of the form namespace/name", r.Pod)
	case len(r.Addresses) == 0 || slices.ContainsFunc(r.Addresses, func(a netip.Addr) bool { return !a.IsValid() }):
		return errors.New("addresses: missing")
	case len(r.Identities) == 0:
		return errors.New("identities: missing")
	}
	for id, until := range r.Identities {
		switch parts, err := identity.Parse(id); {
		case err != nil:
			return fmt.Errorf("identities: %w", err)
		case parts.Namespace != namespace:
			return fmt.Errorf("identities: %s is not of namespace %s", id, namespace)
		case until.IsZero():
			return fmt.Errorf("identities: %s has no end", id)
		}
	}
	return nil
}

// retirements and bindings are the state as a control plane takes it over, sorted.
func (s state) retirements() (out []policy.Retirement) {
	for _, uid := range slices.Sorted(maps.Keys(s.pods)) {
		r := s.pods[uid]
		ids := slices.SortedFunc(maps.Keys(r.Identities), func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
		for _, id := range ids {
			out = append(out, policy.Retirement{Pod: r.Pod, UID: uid, ID: id, Addrs: r.Addresses, Until: r.Identities[id]})
		}
	}
	return out
}

func (s state) bindings() (out []policy.Binding) {
	for _, namespace := range slices.Sorted(maps.Keys(s.bound)) {
		out = append(out, policy.Binding{Namespace: namespace, Until: s.bound[namespace].Until, Why: s.bound[namespace].Why})
	}
	return out
}
