package matcher

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func withSpans(spans ...span) *tree { return byRange(dstIP, chain("two"), spans...) }

// configurations are what Envoy takes and refuses. Where it takes what the interpreter refuses, the reason stands beside it.
var configurations = []struct {
	name     string
	chain    *tree // in filter_chain_matcher,
	rbac     *tree // or in RBAC
	envoy    bool  // takes it
	checking bool  // so does the interpreter
}{
	{"an empty matcher", &tree{}, nil, true, true},
	{"an empty exact map", exactly(dstPort, map[string]on{}, chain("one")), nil, false, false},
	{"an empty prefix map", byPrefix(peer, map[string]on{}, chain("one")), nil, false, false},
	{"an empty list", list(chain("one")), nil, false, false},
	{"an IP matcher without ranges", withSpans(), nil, true, true},
	{"an on_match without anything", exactly(dstPort, map[string]on{"80": {}}, nil), nil, false, false},
	{"or over one", list(nil, when(either(is(dstPort, "1")), chain("one"))), nil, false, false},
	{"a pattern without google_re2", list(nil, when(value(dstPort, &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: "8"}}}), chain("one"))), nil, false, false},
	{"a pattern that is none", list(nil, when(value(dstPort, regex("(")), chain("one"))), nil, false, false},
	{"Int32RangeMatcher", &tree{MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{Input: dstPort,
		TreeType: &matcherv3.Matcher_MatcherTree_CustomMatch{CustomMatch: extension(&matcherv3.Int32RangeMatcher{})}}}}, nil, false, false},
	{"a range that is none", withSpans(within(chain("one"), "x", 8)), nil, false, false},
	{"a range too long: cut off by Envoy", withSpans(within(chain("one"), "10.0.0.0", 33)), nil, true, false},
	{"a range without a length: everything to Envoy", withSpans(&matcherv3.IPMatcher_IPRangeMatcher{OnMatch: chain("one"), Ranges: []*xdscorev3.CidrRange{{AddressPrefix: "10.0.0.0"}}}), nil, true, false},
	{"a chain that is not there: closed by Envoy", exactly(dstPort, map[string]on{"80": chain("nowhere")}, nil), nil, true, false},
	{"keep_matching: fatal to Envoy at the first connection", exactly(dstPort, map[string]on{"80": keep(chain("one"))}, nil), nil, true, false},
	{"an RBAC action for a chain", exactly(dstPort, map[string]on{"80": rule("p")}, nil), nil, false, false},
	{"UriSanInput for a chain", exactly(san, map[string]on{"a": chain("one")}, nil), nil, true, true},
	{"a field of filter state: unknown here", exactly(extension(&networkv3.FilterStateInput{Key: "a", Field: "b"}), map[string]on{"a": chain("one")}, nil), nil, true, false},
	{"SourceTypeInput: unknown here", exactly(extension(&networkv3.SourceTypeInput{}), map[string]on{"local": chain("one")}, nil), nil, true, false},
	{"a config that is no input", exactly(extension(wrapperspb.String("x")), map[string]on{"local": chain("one")}, nil), nil, false, false},

	{"RBAC with an empty matcher", nil, &tree{}, true, true},
	{"RBAC by every input it has", nil, list(rule("p"), when(both(is(dstIP, "1"), is(dstPort, "1"), is(srcIP, "1"), is(srcPort, "1"), is(sni, "1"), is(peer, "1"), is(san, "1")), rule("deny"))), true, true},
	{"RBAC by transport protocol", nil, exactly(transport, map[string]on{"tls": rule("p")}, nil), false, false},
	{"RBAC by ALPN", nil, list(nil, when(not(either(is(dstPort, "1"), is(alpn, "tls"))), rule("p"))), false, false},
	{"RBAC by ALPN in a trie", nil, byRange(dstIP, nil, within(nest(exactly(alpn, map[string]on{"tls": rule("p")}, nil)), "::", 0)), false, false},
	{"RBAC with keep_matching", nil, exactly(dstPort, map[string]on{"80": keep(rule("p"))}, nil), false, false},
	{"RBAC with a chain", nil, exactly(dstPort, map[string]on{"80": chain("one")}, nil), false, false},
	{"RBAC with an action without a name", nil, exactly(dstPort, map[string]on{"80": {OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: extension(&rbacconfigv3.Action{})}}}, nil), false, false},
}

func TestCheck(t *testing.T) {
	for _, c := range configurations {
		var err error
		if c.chain != nil {
			err = CheckListener(asListener("/x", 0, c.chain))
		} else {
			err = CheckRBAC(asECDS(&rbacv3.RBAC{Matcher: c.rbac}))
		}
		if (err == nil) != c.checking {
			t.Errorf("%s: %v; should pass: %t", c.name, err, c.checking)
		}
	}
}

func TestCheckReadsTheShadowMatcher(t *testing.T) {
	bad := exactly(alpn, map[string]on{"tls": rule("p")}, nil)
	if err := CheckRBAC(asECDS(&rbacv3.RBAC{Matcher: &tree{}, ShadowMatcher: bad})); err == nil {
		t.Error("a shadow matcher that Envoy refuses passes")
	}
}

func TestEnvoyTakesAndRefuses(t *testing.T) {
	dir := t.TempDir()
	envoy := envoyPath(t)
	for i, c := range configurations {
		l := asListener(dir, i, c.chain)
		if c.rbac != nil {
			l.FilterChainMatcher = nil
			l.FilterChains = []*listenerv3.FilterChain{guarded(&rbacv3.RBAC{StatPrefix: "x", Matcher: c.rbac}, nil)}
		}
		text, err := protojson.Marshal(&bootstrapv3.Bootstrap{StaticResources: &bootstrapv3.Bootstrap_StaticResources{Listeners: []*listenerv3.Listener{l}}})
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, "envoy.json")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(envoy, "--mode", "validate", "-c", file, "--disable-hot-restart", "--log-level", "warning").CombinedOutput()
		if (err == nil) != c.envoy {
			t.Errorf("%s: %v; should be taken: %t\n%s", c.name, err, c.envoy, out)
		}
	}
}
