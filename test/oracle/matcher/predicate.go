package matcher

import (
	"fmt"
	"regexp"
	"strings"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
)

// truth is what a predicate says.
type truth int

const (
	no truth = iota
	yes
	unavailable // an input is not available: the whole match is given up
)

func truthOf(b bool) truth {
	if b {
		return yes
	}
	return no
}

func holds(p *matcherv3.Matcher_MatcherList_Predicate, c Connection) (truth, error) {
	switch kind := p.GetMatchType().(type) {
	case *matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_:
		return single(kind.SinglePredicate, c)
	case *matcherv3.Matcher_MatcherList_Predicate_AndMatcher: // up to the first that does not hold
		for _, part := range kind.AndMatcher.GetPredicate() {
			if held, err := holds(part, c); err != nil || held != yes {
				return held, err
			}
		}
		return yes, nil
	case *matcherv3.Matcher_MatcherList_Predicate_OrMatcher: // past what is not available, in case a later one holds
		all := no
		for _, part := range kind.OrMatcher.GetPredicate() {
			held, err := holds(part, c)
			if err != nil || held == yes {
				return held, err
			}
			all = max(all, held)
		}
		return all, nil
	case *matcherv3.Matcher_MatcherList_Predicate_NotMatcher:
		held, err := holds(kind.NotMatcher, c)
		switch held {
		case yes:
			held = no
		case no:
			held = yes
		}
		return held, err
	}
	return no, fmt.Errorf("predicate type %T is unknown here", p.GetMatchType())
}

func single(p *matcherv3.Matcher_MatcherList_Predicate_SinglePredicate, c Connection) (truth, error) {
	value, err := input(p.GetInput(), c)
	if err != nil || !value.available {
		return unavailable, err
	}
	m, ok := p.GetMatcher().(*matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch)
	if !ok {
		return no, fmt.Errorf("predicate matcher type %T is unknown here", p.GetMatcher())
	}
	held, err := matchString(m.ValueMatch, value.text)
	return truthOf(held && value.present), err
}

func matchString(m *matcherv3.StringMatcher, text string) (bool, error) {
	fold := func(s string) string {
		if m.GetIgnoreCase() {
			return strings.ToLower(s)
		}
		return s
	}
	switch pattern := m.GetMatchPattern().(type) {
	case *matcherv3.StringMatcher_Exact:
		return fold(text) == fold(pattern.Exact), nil
	case *matcherv3.StringMatcher_Prefix:
		return strings.HasPrefix(fold(text), fold(pattern.Prefix)), nil
	case *matcherv3.StringMatcher_Suffix:
		return strings.HasSuffix(fold(text), fold(pattern.Suffix)), nil
	case *matcherv3.StringMatcher_Contains:
		return strings.Contains(fold(text), fold(pattern.Contains)), nil
	case *matcherv3.StringMatcher_SafeRegex: // RE2, the syntax of package regexp; the whole text has to match
		if m.GetIgnoreCase() {
			return false, fmt.Errorf("regular expression %q: what ignore_case does to one is unknown here", pattern.SafeRegex.GetRegex())
		}
		if pattern.SafeRegex.GetGoogleRe2() == nil {
			return false, fmt.Errorf("regular expression %q: envoy refuses one without google_re2", pattern.SafeRegex.GetRegex())
		}
		re, err := regexp.Compile(`\A(?:` + pattern.SafeRegex.GetRegex() + `)\z`)
		if err != nil {
			return false, fmt.Errorf("regular expression %q: %w", pattern.SafeRegex.GetRegex(), err)
		}
		return re.MatchString(text), nil
	}
	return false, fmt.Errorf("string pattern %T is unknown here", m.GetMatchPattern())
}
