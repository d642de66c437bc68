package retired

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane/policy"
)

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func identityOf(namespace string, n int) spiffeid.ID {
	return spiffeid.RequireFromString(fmt.Sprintf("spiffe://td.example/ns/%s/sa/default/labels/%032x", namespace, n))
}

// retirement is the n-th identity that a pod no longer has.
func retirement(pod, uid string, n int, until time.Time) policy.Retirement {
	namespace, _, _ := strings.Cut(pod, "/")
	return policy.Retirement{Pod: pod, UID: uid, ID: identityOf(namespace, n), Addrs: []netip.Addr{netip.MustParseAddr("10.64.0.2")}, Until: until}
}

func written(t *testing.T, s state) map[string][]byte {
	t.Helper()
	data, err := s.encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// What is merged in whatever order is the same bytes, each with its latest end, and is read back as it was.
func TestMerge(t *testing.T) {
	list := []policy.Retirement{
		retirement("shop/api", "a", 1, noon), retirement("shop/api", "a", 1, noon.Add(time.Hour)), retirement("shop/api", "a", 2, noon),
		retirement("shop/db", "b", 1, noon),
	}
	list[2].Addrs = []netip.Addr{netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("10.64.0.1")}
	one, other := newState(), newState()
	for i, r := range list {
		one.add(r)
		other.add(list[len(list)-1-i])
	}
	one.bind("else", bound{noon, "x"})
	other.bind("else", bound{noon, "x"})
	if !equal(written(t, one), written(t, other)) {
		t.Errorf("%s\n%s", written(t, one), written(t, other))
	}
	want := `{"pod":"shop/api","addresses":["10.64.0.1","10.64.0.2","2001:db8::2"],"identities":{` +
		`"spiffe://td.example/ns/shop/sa/default/labels/00000000000000000000000000000001":"2026-01-02T13:00:00Z",` +
		`"spiffe://td.example/ns/shop/sa/default/labels/00000000000000000000000000000002":"2026-01-02T12:00:00Z"}}`
	if got := string(written(t, one)["a"]); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	back, errs := decode(written(t, one), noon)
	if len(errs) > 0 || !equal(written(t, back), written(t, one)) {
		t.Errorf("read back: %v %s", errs, written(t, back))
	}
	for i, r := range list {
		if !back.covers(r) {
			t.Errorf("retirement %d is new to what holds it", i)
		}
	}
	if back.covers(retirement("shop/api", "a", 1, noon.Add(2*time.Hour))) || back.covers(retirement("shop/api", "c", 1, noon)) {
		t.Error("what is new is taken for known")
	}
	if next := back.expire(noon); !next.Equal(noon.Add(time.Hour)) || len(back.pods) != 1 || len(back.bound) != 0 {
		t.Errorf("after %s is left %+v until %s", noon, back, next)
	}
	if next := back.expire(noon.Add(time.Hour)); !next.IsZero() || len(back.pods) != 0 {
		t.Errorf("at its end is left %+v until %s", back, next)
	}
}

// Whoever fills the Secret is written down more coarsely, and nobody else is.
func TestFold(t *testing.T) {
	size := func(s state) (n int) {
		for k, v := range written(t, s) {
			n += len(k) + len(v)
		}
		return n
	}
	s := newState()
	quiet := retirement("quiet/api", "q", 1, noon)
	s.add(quiet)
	for i := range 5000 {
		s.add(retirement("loud/api", "l", i, noon.Add(time.Duration(i)*time.Second)))
		if i%100 == 0 {
			if err := s.fold(); err != nil {
				t.Fatal(err)
			}
			if n := size(s); n > 2*mostOfNamespace {
				t.Fatalf("%d bytes", n)
			}
		}
	}
	if err := s.fold(); err != nil {
		t.Fatal(err)
	}
	if !s.covers(quiet) || len(s.bound) != 1 {
		t.Errorf("bound are %v", s.bindings())
	}
	ends := s.bound["loud"].Until
	for _, r := range s.retirements() {
		if r.Pod == "loud/api" && r.Until.After(ends) {
			ends = r.Until
		}
	}
	if want := noon.Add(4999 * time.Second); !ends.Equal(want) {
		t.Errorf("the last ends at %s, not %s", ends, want)
	}

	// Many namespaces that are each within their bounds: those that have most go first.
	for n := range 30 {
		for i := range 150 + 10*n {
			s.add(retirement(fmt.Sprintf("n%02d/api", n), fmt.Sprint("u", n), i, noon))
		}
	}
	if err := s.fold(); err != nil {
		t.Fatal(err)
	}
	if n := size(s); n > mostOfAll || n < mostOfAll/2 || !s.covers(quiet) {
		t.Errorf("%d bytes", n)
	}
	if _, least := s.bound["n00"]; least {
		t.Error("the smallest was bound")
	}
	if _, most := s.bound["n29"]; !most {
		t.Error("the largest was not")
	}

	// More namespaces than can be written down at all.
	for n := range 6000 {
		s.bind(fmt.Sprintf("%s-%d", strings.Repeat("n", 50), n), bound{noon.Add(time.Duration(n) * time.Second), "x"})
	}
	if err := s.fold(); err != nil {
		t.Fatal(err)
	}
	if b := s.bindings(); len(b) != 1 || b[0].Namespace != "" || !b[0].Until.Equal(noon.Add(5999*time.Second)) || size(s) > mostOfAll {
		t.Errorf("bound are %d, %v first", len(b), b[0])
	}
}

// What cannot be read is an error that names it, binds all, and takes nothing from the rest.
func TestBroken(t *testing.T) {
	whole := newState()
	good := retirement("shop/api", "good", 1, noon)
	whole.add(good)
	text := string(written(t, whole)["good"])
	worst := noon.Add(time.Hour)
	for name, c := range map[string]struct{ key, value, want string }{
		"nonsense":            {"x", "nonsense", "key x: invalid character"},
		"empty":               {"x", "", "EOF"},
		"cut off":             {"x", text[:len(text)-4], "EOF"},
		"twice":               {"x", text + text, "something follows"},
		"a field of tomorrow": {"x", strings.Replace(text, "{", `{"more":1,`, 1), "unknown field"},
		"no addresses":        {"x", strings.Replace(text, `["10.64.0.2"]`, "[]", 1), "addresses: missing"},
		"no address":          {"x", strings.Replace(text, "10.64.0.2", "10.64", 1), "10.64"},
		"no identity":         {"x", `{"pod":"shop/api","addresses":["10.64.0.2"],"identities":{}}`, "identities: missing"},
		"no pod":              {"x", strings.Replace(text, "shop/api", "shop", 1), "namespace/name"},
		"another namespace":   {"x", strings.Replace(text, "shop/api", "else/api", 1), "not of namespace else"},
		"not a workload":      {"x", strings.Replace(text, "/ns/shop", "/of/shop", 1), "not of the form"},
		"no end":              {"x", strings.Replace(text, "2026-01-02T12:00:00Z", "0001-01-01T00:00:00Z", 1), "no end"},
		"no UID":              {"a_b", text, "neither a pod's UID"},
		"no namespace":        {"namespace.A", `{"until":"2026-01-02T12:00:00Z","why":""}`, "neither a pod's UID"},
		"bound for no time":   {"namespace.a", `{"why":""}`, "until: missing"},
		"null":                {"x", "null", "namespace/name"},
	} {
		s, errs := decode(map[string][]byte{"good": []byte(text), c.key: []byte(c.value)}, worst)
		if len(errs) != 1 || !strings.Contains(errs[0].Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, errs, c.want)
		}
		if b := s.bindings(); len(b) != 1 || b[0].Namespace != "" || !b[0].Until.Equal(worst) || !strings.Contains(b[0].Why, "could not be read: key "+c.key) {
			t.Errorf("%s: bound are %v", name, b)
		}
		if !s.covers(good) || len(s.pods) != 1 {
			t.Errorf("%s: what is good is lost", name)
		}
	}
}

// A UID that no API server gives does not get past the record.
func TestStrangeUID(t *testing.T) {
	s := newState()
	s.add(retirement("shop/api", "a.b", 1, noon))
	if b := s.bindings(); len(s.pods) != 0 || len(b) != 1 || b[0].Namespace != "shop" || !b[0].Until.Equal(noon) {
		t.Errorf("%+v", s)
	}
	if uid.MatchString(clusterKey) || uid.MatchString(namespaceKey+"x") {
		t.Error("keys can be taken for UIDs")
	}
}
