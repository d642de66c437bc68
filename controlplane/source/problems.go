package source

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with the input.
type Problem struct {
	File   string // as it was named, or found below a folder that was named; empty: the input as a whole
	Line   int    // from 1; 0: not known
	Object string // "Kind namespace/name", as far as known
	Field  string // "spec.ingress[0].from[1].ipBlock.cidr"; may be empty
	Text   string // what is wrong
	Hint   string // what to do; may be empty
}

// String writes "file:line: Kind namespace/name: field: text", and the hint on a line of its own.
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d", p.Line)
		}
		b.WriteString(": ")
	}
	for _, s := range []string{p.Object, p.Field} {
		if s != "" {
			b.WriteString(s + ": ")
		}
	}
	b.WriteString(p.Text)
	if p.Hint != "" {
		b.WriteString("\n  hint: " + p.Hint)
	}
	return b.String()
}

// Problems is the error of [ReadManifests]: everything that is wrong, in the order of files and lines.
type Problems []Problem

// shown is how many problems Error writes out.
const shown = 20

// Error lists the problems, at most 20 of them, one to a line with its hint below it.
func (ps Problems) Error() string {
	var lines []string
	for i, p := range ps {
		if i == shown {
			lines = append(lines, fmt.Sprintf("… and %d more problems", len(ps)-shown))
			break
		}
		lines = append(lines, p.String())
	}
	return strings.Join(lines, "\n")
}

// sorted puts the problems in order and drops repetitions.
func (ps Problems) sorted() Problems {
	slices.SortStableFunc(ps, func(a, b Problem) int {
		return cmp.Or(strings.Compare(a.File, b.File), a.Line-b.Line, strings.Compare(a.Object, b.Object),
			strings.Compare(a.Field, b.Field), strings.Compare(a.Text, b.Text))
	})
	return slices.Compact(ps)
}
