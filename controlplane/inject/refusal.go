package inject

import (
	"strings"
)

// Refusal says why a pod cannot have a sidecar that enforces.
type Refusal struct {
	Pod     string // "namespace/name"
	Reasons []Reason
	// Passing says that the same pod, created again, may well pass: one replica injected its sidecar and another one of another version or
	// configuration has verified it, as while Mantlet is upgraded.
	Passing bool
}

// Reason is one of them.
type Reason struct {
	Field string // as field.Path writes it
	Text  string // what it does, in words that follow the field and a colon
	Hint  string // what to do; "": the text says it
}

func (r Reason) String() string {
	s := r.Text
	if r.Field != "" {
		s = r.Field + ": " + s
	}
	if r.Hint != "" {
		s += "; " + r.Hint
	}
	return s
}

// Error is one line for one reason, else a line for each.
func (r *Refusal) Error() string {
	head := "pod " + r.Pod + " is refused, since Mantlet could not enforce policy in it: "
	if len(r.Reasons) == 1 {
		return head + r.Reasons[0].String()
	}
	var b strings.Builder
	b.WriteString(strings.TrimSuffix(head, " "))
	for _, reason := range r.Reasons {
		b.WriteString("\n  - " + reason.String())
	}
	return b.String()
}
