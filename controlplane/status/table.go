package status

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Detail is how much a table says of sidecars.
type Detail uint8

// Which sidecars a table lists.
const (
	Exceptions Detail = iota // those in which not everything is in force
	Everybody
)

// Table writes a Status for people. Times are told from now on.
func (s Status) Table(w io.Writer, detail Detail, now time.Time) error {
	t := &table{Writer: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0), now: now}
	t.row("REPLICA", "SIDECARS", "POLICIES", "ROOT ENDS")
	for _, r := range s.Replicas {
		if r.Error != "" {
			t.row(r.Name, "?", "?", "not heard: "+r.Error)
			continue
		}
		t.row(r.Name, r.Sidecars, r.Policies, t.until(lastOf(r.Roots)))
	}
	for _, r := range s.Replicas {
		if r.Problem != "" {
			t.row(r.Name + ": " + r.Problem)
		}
	}
	for _, b := range s.Bindings {
		of := "all namespaces"
		if b.Namespace != "" {
			of = "namespace " + b.Namespace
		}
		t.row(fmt.Sprintf("identities of %s count from addresses of pods that have them only; that ends %s: %s", of, t.until(b.Until), b.Why))
	}
	t.row()
	t.row("NAMESPACE", "MODE", "PODS", "SIDECARS", "IN FORCE")
	for _, n := range s.Namespaces {
		mode := n.Mode
		switch {
		case n.Exempt:
			mode = string(Exempt)
		case n.Required:
			mode += ", required"
		}
		t.row(n.Name, mode, n.Pods, n.Sidecars, n.InForce)
	}
	for _, n := range s.Namespaces {
		if len(n.Missing) > 0 {
			t.row(fmt.Sprintf("%s requires sidecars, and has none in %s, to be replaced: %s", n.Name, count(len(n.Missing), "pod"), named(n.Missing)))
		}
	}
	t.row()
	t.row("POLICY", "ENFORCEMENT")
	for _, p := range s.Policies {
		t.row(p.Name, p.Summary())
	}
	t.row()
	t.sidecars(s.Sidecars, detail)
	return t.Flush()
}

type table struct {
	*tabwriter.Writer
	now time.Time
}

func (t *table) row(cells ...any) {
	for i, c := range cells {
		if i > 0 {
			fmt.Fprint(t, "\t")
		}
		fmt.Fprint(t, printable(fmt.Sprint(c)))
	}
	fmt.Fprintln(t)
}

// printable keeps what sidecars said from moving the terminal's cursor, or the table's cells.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

func (t *table) sidecars(list []SidecarStatus, detail Detail) {
	well := 0
	for _, c := range list {
		if c.State == InForce {
			well++
		}
	}
	if len(list) == 0 {
		t.row("no sidecar is known")
		return
	}
	if detail == Exceptions && well == len(list) {
		t.row(fmt.Sprintf("%s: all in force", count(well, "sidecar")))
		return
	}
	t.row("SIDECAR", "STATE", "REPLICA", "CONNECTED", "LAST ACK", "CERTIFICATE ENDS", "NOT CONFIRMED")
	for _, c := range list {
		if detail == Exceptions && c.State == InForce {
			continue
		}
		t.row(c.Pod, c.State, orDash(c.Replica), t.since(c.Since), t.since(c.LastAck), t.until(c.Certificate), orDash(c.unconfirmed()))
	}
	if detail == Exceptions && well > 0 {
		t.row(fmt.Sprintf("and %s in force", count(well, "sidecar")))
	}
}

// unconfirmed names what a sidecar has refused, with its words, and what it has not answered.
func (c SidecarStatus) unconfirmed() string {
	var parts []string
	for _, r := range c.Refused {
		parts = append(parts, fmt.Sprintf("refused %s %s: %s", r.Type, r.Name, r.Reason))
	}
	for i, r := range c.Waiting {
		if i == 3 {
			parts = append(parts, fmt.Sprintf("and %d more", len(c.Waiting)-i))
			break
		}
		parts = append(parts, r.Type+" "+r.Name)
	}
	return strings.Join(parts, ", ")
}

// Summary says in one line where a policy is in force, and where not and why.
func (ps PolicyStatus) Summary() string {
	parts := []string{fmt.Sprintf("%d of %d in force", ps.InForce, ps.Pods)}
	if ps.Pods == 0 {
		parts = []string{"selects no pod"}
	}
	for _, reason := range slices.Sorted(maps.Keys(ps.Reasons)) {
		pods := ps.Reasons[reason]
		parts = append(parts, fmt.Sprintf("%d refused it: %s (%s)", len(pods), reason, named(pods)))
	}
	for _, of := range []struct {
		state State
		verb  [2]string // of one, of more
		what  string
	}{
		{Waiting, [2]string{"has", "have"}, "not confirmed it yet"},
		{NotConnected, [2]string{"is", "are"}, "not connected"},
		{NoSidecar, [2]string{"has", "have"}, "no sidecar"},
		{Exempt, [2]string{"is", "are"}, "in a namespace whose pods get no sidecars"},
		{Unknown, [2]string{"is", "are"}, "not known: a replica was not heard"},
	} {
		if pods := ps.Elsewhere[of.state]; len(pods) > 0 {
			parts = append(parts, fmt.Sprintf("%s %s %s (%s)", count(len(pods), "pod"), of.verb[min(len(pods)-1, 1)], of.what, named(pods)))
		}
	}
	if len(ps.Behind) > 0 {
		verb := [2]string{"has", "have"}[min(len(ps.Behind)-1, 1)]
		parts = append(parts, fmt.Sprintf("%s %s another version (%s)", count(len(ps.Behind), "replica"), verb, named(ps.Behind)))
	}
	for _, p := range ps.Problems {
		parts = append(parts, "closed for what is invalid: "+p)
	}
	return strings.Join(parts, "; ")
}

func named(pods []string) string {
	const most = 3
	if len(pods) <= most {
		return strings.Join(pods, ", ")
	}
	return fmt.Sprintf("%s, …", strings.Join(pods[:most], ", "))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (t *table) since(at time.Time) string {
	if at.IsZero() {
		return "-"
	}
	return span(t.now.Sub(at)) + " ago"
}

func (t *table) until(at time.Time) string {
	switch {
	case at.IsZero():
		return "-"
	case at.Before(t.now):
		return "ended " + span(t.now.Sub(at)) + " ago"
	}
	return "in " + span(at.Sub(t.now))
}

// span is a duration in its largest unit.
func span(d time.Duration) string {
	d = max(d, 0)
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	case d >= 2*time.Minute:
		return fmt.Sprintf("%dm", d/time.Minute)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}
