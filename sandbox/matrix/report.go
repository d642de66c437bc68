package matrix

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/verdict"
)

// The verdicts of a Connection.
const (
	Allowed = "allowed"
	Denied  = "denied"
)

// Connection is one attempt and what became of it.
type Connection struct {
	From          string         `json:"from"`
	To            string         `json:"to"` // pod or service "namespace/name", or the external range
	Address       string         `json:"address"`
	Port          uint16         `json:"port"`
	Protocol      string         `json:"protocol"`
	Via           Via            `json:"via"`
	Verdict       string         `json:"verdict"`
	EnforcedBy    EnforcedBy     `json:"enforcedBy"`    // by what the peer was told
	Authenticated bool           `json:"authenticated"` // both ends proved who they are
	Reason        verdict.Reason `json:"reason"`
	// Observed is nil where nothing was tried: the verdict is the evaluator's then.
	*Observed
	// Partly says that the verdict depends on which endpoint of a service is picked.
	Partly string `json:"partly,omitempty"`
	// Mismatch says in what the real packets differ from the evaluator. Only the sandbox can fill it.
	Mismatch string `json:"mismatch,omitempty"`
}

// String writes "shop/web-0 → shop/db-0:5432", "shop/web-0 → dns/coredns-0:53/UDP".
func (c *Connection) String() string {
	return fmt.Sprintf("%s → %s:%s", c.From, c.To, c.port())
}

// port is the port as people read it.
func (c *Connection) port() string {
	if c.Protocol == verdict.TCP.String() {
		return fmt.Sprint(c.Port)
	}
	return fmt.Sprintf("%d/%s", c.Port, c.Protocol)
}

// Observed is what real packets met with. Only the sandbox can fill it.
type Observed struct {
	// Connect is what connect() said, a word below or the error's text. Empty for UDP: connect() asks nobody there.
	Connect string `json:"connect,omitempty"`
	// Datagram is what became of a datagram, a word below or the error's text. Empty for TCP.
	Datagram string `json:"datagram,omitempty"`
	// Bytes that arrived at the source.
	Bytes int `json:"bytes"`
}

// Words of Observed. A datagram that is denied is met by silence, or is not permitted to leave.
const (
	Connected    = "connected"     // connect() succeeded: somebody has accepted, the app or a sidecar
	Refused      = "refused"       // RST, or for a datagram ICMP: nobody listens there
	Reset        = "reset"         // RST after the connection was there
	Unreachable  = "unreachable"   // ICMP: no way to that address
	NotPermitted = "not permitted" // EPERM: the source's own packet filter
	TimedOut     = "timed out"     // connect() was neither accepted nor refused
	Answered     = "answered"      // the datagram arrived, and so did the answer
	Silence      = "silence"       // the datagram did not arrive
	Unanswered   = "unanswered"    // the datagram arrived, and the answer did not
)

// Summary counts.
type Summary struct {
	Pods          int `json:"pods"`
	Connections   int `json:"connections"`
	Allowed       int `json:"allowed"`
	Denied        int `json:"denied"`
	Authenticated int `json:"authenticated"`
	Mismatches    int `json:"mismatches"`
}

// Report is the whole result.
type Report struct {
	Connections []Connection `json:"connections"`
	Summary     Summary      `json:"summary"`
}

// Summarize counts the connections anew.
func (r *Report) Summarize() {
	r.Summary = Summary{Connections: len(r.Connections)}
	pods := map[string]bool{}
	for i := range r.Connections {
		c := &r.Connections[i]
		pods[c.From] = true
		if c.Verdict == Allowed {
			r.Summary.Allowed++
		} else {
			r.Summary.Denied++
		}
		if c.Authenticated {
			r.Summary.Authenticated++
		}
		if c.Mismatch != "" {
			r.Summary.Mismatches++
		}
	}
	r.Summary.Pods = len(pods)
}

// WriteJSON writes the report, a connection a line.
func (r *Report) WriteJSON(w io.Writer) error {
	b := bufio.NewWriterSize(w, 1<<16)
	b.WriteString(`{"connections":[`)
	enc := json.NewEncoder(b)
	enc.SetEscapeHTML(false)
	for i := range r.Connections {
		if i > 0 {
			b.WriteByte(',')
		}
		if err := enc.Encode(&r.Connections[i]); err != nil {
			return err
		}
	}
	b.WriteString(`],"summary":`)
	if err := enc.Encode(&r.Summary); err != nil {
		return err
	}
	b.WriteString("}\n")
	return b.Flush()
}

// WriteYAML writes the report as YAML.
func (r *Report) WriteYAML(w io.Writer) error {
	out, err := yaml.Marshal(r)
	if err != nil {
		return err
	}
	_, err = w.Write(out)
	return err
}

// Palette says whether a table may use colour.
type Palette int

// The palettes.
const (
	Plain Palette = iota
	Colour
)

func (p Palette) paint(code, s string) string {
	if p == Plain {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// cells of the table.
const (
	cellMTLS     = "●"
	cellPlain    = "○"
	cellDenied   = "×"
	cellMismatch = "!"
	cellSelf     = "·"
	cellNone     = " "
)

// WriteTable writes the matrix for people: rows are sources, columns numbered destinations; both families of a destination are one
// column. explain bounds how many denials are explained below it; the rest is counted.
func (r *Report) WriteTable(w io.Writer, p Palette, explain int) error {
	b := bufio.NewWriter(w)
	type column struct {
		to   string
		via  Via
		port string
	}
	var columns []column
	var rows []string
	index := map[column]int{}
	rowOf := map[string]int{}
	cells := map[[2]int][]*Connection{}
	for i := range r.Connections {
		c := &r.Connections[i]
		col := column{c.To, c.Via, c.port()}
		if _, ok := index[col]; !ok {
			index[col] = len(columns)
			columns = append(columns, col)
		}
		if _, ok := rowOf[c.From]; !ok {
			rowOf[c.From] = len(rows)
			rows = append(rows, c.From)
		}
		at := [2]int{rowOf[c.From], index[col]}
		cells[at] = append(cells[at], c)
	}
	width := len("FROM \\ TO")
	for _, row := range rows {
		width = max(width, len(row))
	}
	colWidth := len(fmt.Sprint(len(columns))) + 1
	for i, c := range columns {
		fmt.Fprintf(b, "%*d  %s:%s%s\n", colWidth, i+1, c.to, c.port, map[Via]string{ViaPod: "", ViaService: " (service)", ViaExternal: " (external)"}[c.via])
	}
	fmt.Fprintf(b, "\n%-*s", width, "FROM \\ TO")
	for i := range columns {
		fmt.Fprintf(b, "%*d", colWidth, i+1)
	}
	b.WriteByte('\n')
	for i, row := range rows {
		fmt.Fprintf(b, "%-*s", width, row)
		for j := range columns {
			symbol, code := cell(cells[[2]int{i, j}])
			b.WriteString(strings.Repeat(" ", colWidth-1) + p.paint(code, symbol))
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(b, "\n%s allowed, mTLS-authenticated   %s allowed, not authenticated   %s denied   %s itself",
		p.paint("32", cellMTLS), p.paint("33", cellPlain), p.paint("31", cellDenied), p.paint("2", cellSelf))
	if r.Summary.Mismatches > 0 {
		fmt.Fprintf(b, "   %s packets and evaluator differ", p.paint("35;1", cellMismatch))
	}
	s := r.Summary
	fmt.Fprintf(b, "\n%d pods, %d connections: %d allowed (%d authenticated), %d denied\n", s.Pods, s.Connections, s.Allowed, s.Authenticated, s.Denied)
	if slices.ContainsFunc(r.Connections, func(c Connection) bool { return c.Protocol != verdict.TCP.String() }) {
		b.WriteString("UDP and SCTP are enforced by address: nobody can authenticate them\n")
	}
	r.explain(b, explain)
	return b.Flush()
}

func cell(cs []*Connection) (symbol, colour string) {
	if len(cs) == 0 {
		return cellNone, "0"
	}
	switch {
	case slices.ContainsFunc(cs, func(c *Connection) bool { return c.Mismatch != "" }):
		return cellMismatch, "35;1"
	case slices.ContainsFunc(cs, func(c *Connection) bool { return c.Verdict != cs[0].Verdict }):
		return "½", "33" // one family only
	case cs[0].Verdict == Denied:
		return cellDenied, "31"
	case cs[0].Via == ViaPod && cs[0].From == cs[0].To:
		return cellSelf, "2" // never leaves the pod: nobody has to prove anything
	case slices.ContainsFunc(cs, func(c *Connection) bool { return !c.Authenticated }):
		return cellPlain, "33"
	}
	return cellMTLS, "32"
}

// denial is a line of the explanation: the families of a destination share one.
type denial struct {
	where  string
	reason verdict.Reason
}

// kind groups denials that teach the same.
type kind struct {
	nearest   bool
	direction string
	policy    bool // some policy decided, not the mode or a missing address
}

// explain lists all mismatches, and denials with their reasons: first one of each kind, nearest misses before all, then the others.
func (r *Report) explain(b *bufio.Writer, most int) {
	var firsts, others []denial
	seen, kinds := map[denial]bool{}, map[kind]bool{}
	for i := range r.Connections {
		c := &r.Connections[i]
		where := c.String()
		if c.Mismatch != "" {
			fmt.Fprintf(b, "MISMATCH %s (%s): %s\n", where, c.Address, c.Mismatch)
		}
		d := denial{where, c.Reason}
		if c.Verdict != Denied || seen[d] {
			continue
		}
		seen[d] = true
		if k := (kind{c.Reason.Nearest, c.Reason.Direction, c.Reason.Policy != ""}); !kinds[k] {
			kinds[k] = true
			firsts = append(firsts, d)
		} else {
			others = append(others, d)
		}
	}
	slices.SortStableFunc(firsts, func(a, b denial) int { return rank(a) - rank(b) })
	list := append(firsts, others...)
	for i, d := range list {
		if i == most {
			fmt.Fprintf(b, "  … and %d more; --explain N shows more of them, -o json all\n", len(list)-most)
			break
		}
		if i == 0 {
			b.WriteString("\nDenied:\n")
		}
		fmt.Fprintf(b, "  %s\n      %s\n", d.where, d.reason.Text)
	}
}

// rank puts one nearest miss first, which is what people look for, and what no policy decided last.
func rank(d denial) int {
	switch {
	case d.reason.Nearest && d.reason.Direction == "ingress":
		return 0
	case d.reason.Policy == "":
		return 3
	case d.reason.Nearest:
		return 2
	}
	return 1
}
