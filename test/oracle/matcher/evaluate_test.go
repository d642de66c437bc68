package matcher

import (
	"strings"
	"testing"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// TestEvaluateNeverGuesses comes past what the interpreter does not know.
func TestEvaluateNeverGuesses(t *testing.T) {
	unknown := extension(wrapperspb.Bool(true))
	custom := &matcherv3.Matcher_MatcherTree{Input: dstPort, TreeType: &matcherv3.Matcher_MatcherTree_CustomMatch{CustomMatch: unknown}}
	for name, m := range map[string]*tree{
		"input":                exactly(unknown, map[string]on{"80": chain("one")}, chain("two")),
		"input in a predicate": list(chain("two"), when(not(is(unknown, "a")), chain("one"))),
		"custom matcher":       {MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: custom}, OnNoMatch: chain("two")},
		"action":               exactly(dstPort, map[string]on{"80": {OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: unknown}}}, nil),
		"keep_matching":        exactly(dstPort, map[string]on{"80": keep(chain("one"))}, chain("two")),
		"empty on_match":       exactly(dstPort, map[string]on{"80": {}}, chain("two")),
		"ignored case":         list(nil, when(value(dstPort, &matcherv3.StringMatcher{IgnoreCase: true, MatchPattern: regex("8").MatchPattern}), chain("one"))),
		"no pattern":           list(nil, when(value(dstPort, &matcherv3.StringMatcher{}), chain("one"))),
		"no predicate":         list(nil, when(nil, chain("one"))),
		"filter state field":   exactly(extension(&networkv3.FilterStateInput{Key: "a", Field: "b"}), map[string]on{"a": chain("one")}, nil),
	} {
		if got, err := Evaluate(m, from("a")); err == nil {
			t.Errorf("unknown %s: %+v without an error", name, got)
		}
	}
	if got, err := Evaluate(byRange(peer, chain("two"), within(chain("one"), "::", 0)), from("fe80::1%1")); err == nil {
		t.Errorf("an address with a zone: %+v without an error", got)
	}
	if got, err := Evaluate(exactly(dstIP, map[string]on{"a": chain("one")}, chain("two")), Connection{}); err == nil {
		t.Errorf("a connection without the address asked for: %+v without an error", got)
	}
}

func TestRBACNeverGuesses(t *testing.T) {
	logging := &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: extension(&rbacconfigv3.Action{Name: "p", Action: rbacconfigv3.RBAC_LOG})}}
	for name, r := range map[string]*rbacv3.RBAC{
		"rules":  {Rules: &rbacconfigv3.RBAC{}},
		"log":    {Matcher: &tree{OnNoMatch: logging}},
		"chains": {Matcher: &tree{OnNoMatch: chain("one")}},
	} {
		if got, err := RBAC(asECDS(r), from("")); err == nil {
			t.Errorf("%s: %+v without an error", name, got)
		}
	}
	wrong := asECDS(&rbacv3.RBAC{})
	wrong.TypedConfig = pack(wrapperspb.String("x"))
	if got, err := RBAC(wrong, from("")); err == nil {
		t.Errorf("another filter: %+v without an error", got)
	}
}

func TestActionSaysWhatItIs(t *testing.T) {
	a, err := Evaluate(&tree{OnNoMatch: rule("p")}, from(""))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := a.RBAC(); err != nil || r.GetName() != "p" {
		t.Errorf("RBAC: %v, %v", r, err)
	}
	if name, err := a.Chain(); err == nil || !strings.Contains(err.Error(), "StringValue") {
		t.Errorf("Chain: %q, %v", name, err)
	}
}
