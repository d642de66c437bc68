// Package expected reads the matrices that were thought out by hand for the examples, and compares reports with them.
//
//	examples/NAME/expected.txt ──Load──► Matrix ──┬─ Options ─► what the report is to be taken with
//	                        matrix.Report ────────┴─ Diff ────► what differs; nothing: they agree
//
// The file holds one line for each connection, and no other connections are expected:
//
//	# flags: --external 203.0.113.0/24:443
//	from         to:port              via       verdict  auth   policy             rule
//	shop/api-0   shop/db-0:5432       pod       allowed  mtls   shop/db-from-api   ingress[0]
//	shop/web-0   shop/db:5432         service   denied   -      shop/db-from-api   ingress[0]
//	shop/web-0   203.0.113.0/24:443   external  allowed  plain  -                  -
//
// auth is mtls where both ends prove who they are, plain where not, and "-" where nothing is allowed. Policy and rule are those of
// the reason: what admits, or what came nearest; "-" where no policy decides. Both address families have to give the same, so a line
// names none. Empty lines and lines that start with # are left out, but for the flags in the first one.
package expected

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mantlet/mantlet/sandbox/matrix"
)

// File is the name of the file in an example's folder.
const File = "expected.txt"

// Matrix is who reaches whom in one example.
type Matrix struct {
	// Options are those of the flags in the first line.
	Options matrix.Options
	// Lines are in the order of the file, each Key once.
	Lines []Line
}

// Key names a connection in all address families.
type Key struct {
	From string // "namespace/pod"
	To   string // "namespace/pod", "namespace/service", or the external range
	Port matrix.Port
	Via  matrix.Via
}

// String writes "shop/api-0 → shop/db-0:5432 (pod)".
func (k Key) String() string {
	return fmt.Sprintf("%s → %s:%d/%s (%s)", k.From, k.To, k.Port.Number, k.Port.Protocol, k.Via)
}

// Outcome is what becomes of a connection.
type Outcome struct {
	Verdict string // matrix.Allowed or matrix.Denied
	Auth    string // MTLS, Plain or Nobody
	Policy  string // "namespace/name"; empty: no policy decides
	Rule    string // "ingress[0]"; empty: no single rule
}

// The values of Outcome.Auth.
const (
	MTLS   = "mtls"
	Plain  = "plain"
	Nobody = "-"
)

// String writes the outcome as its line does.
func (o Outcome) String() string {
	return fmt.Sprintf("%s %s %s %s", o.Verdict, o.Auth, dash(o.Policy), dash(o.Rule))
}

// Line is one line of the file.
type Line struct {
	Number int // in the file, from 1
	Key
	Outcome
}

// Load reads the expected matrix of an example's folder. The error names every line that cannot be read.
func Load(dir string) (*Matrix, error) {
	path := filepath.Join(dir, File)
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("expected matrix: %w", err)
	}
	m, err := parse(string(text))
	if err != nil {
		return nil, fmt.Errorf("expected matrix %s:\n%w", path, err)
	}
	return m, nil
}

func parse(text string) (*Matrix, error) {
	m := &Matrix{}
	var errs []error
	first := map[Key]int{}
	for i, s := range strings.Split(text, "\n") {
		var err error
		if flags, ok := strings.CutPrefix(s, "# flags:"); ok {
			if i > 0 {
				err = errors.New("the flags stand in the first line")
			} else {
				m.Options, err = parseFlags(strings.Fields(flags))
			}
		} else if s = strings.TrimSpace(s); s != "" && s[0] != '#' {
			l := Line{Number: i + 1}
			if err = l.parse(strings.Fields(s)); err == nil {
				if before := first[l.Key]; before > 0 {
					err = fmt.Errorf("%s stands in line %d already", l.Key, before)
				}
				first[l.Key] = l.Number
				m.Lines = append(m.Lines, l)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("line %d: %w", i+1, err))
		}
	}
	if len(m.Lines) == 0 {
		errs = append(errs, errors.New("no line names a connection"))
	}
	return m, errors.Join(errs...)
}

// parseFlags reads the flags of mantlet simulate that say what is tried.
func parseFlags(words []string) (matrix.Options, error) {
	var o matrix.Options
	for ; len(words) >= 2; words = words[2:] {
		switch words[0] {
		case "--external":
			e, err := matrix.ParseExternal(words[1])
			if err != nil {
				return o, err
			}
			o.External = append(o.External, e)
		case "--port":
			p, err := matrix.ParsePort(words[1])
			if err != nil {
				return o, err
			}
			o.Ports = append(o.Ports, p)
		default:
			return o, fmt.Errorf("flag %s: want --external CIDR:PORT or --port PORT/PROTOCOL", words[0])
		}
	}
	if len(words) > 0 {
		return o, fmt.Errorf("flag %s: its value is missing", words[0])
	}
	return o, nil
}

func (l *Line) parse(f []string) error {
	if len(f) != 7 {
		return fmt.Errorf("%d words; want 7: from to:port via verdict auth policy rule", len(f))
	}
	colon := strings.LastIndex(f[1], ":")
	if colon < 0 {
		return fmt.Errorf("%q: want to:port", f[1])
	}
	port, err := matrix.ParsePort(f[1][colon+1:])
	if err != nil {
		return err
	}
	l.Key = Key{From: f[0], To: f[1][:colon], Port: port, Via: matrix.Via(f[2])}
	l.Outcome = Outcome{Verdict: f[3], Auth: f[4], Policy: undash(f[5]), Rule: undash(f[6])}
	switch {
	case !slices.Contains([]matrix.Via{matrix.ViaPod, matrix.ViaService, matrix.ViaExternal}, l.Via):
		return fmt.Errorf("via %q: want pod, service or external", l.Via)
	case l.Verdict == matrix.Allowed && (l.Auth == MTLS || l.Auth == Plain):
	case l.Verdict == matrix.Denied && l.Auth == Nobody:
	default:
		return fmt.Errorf("%q %q: want allowed mtls, allowed plain, or denied -", l.Verdict, l.Auth)
	}
	return nil
}

// Diff says where a report differs from the matrix, a line for each difference: connections that are missing, connections that
// are too many, and connections of which any address family has another outcome. No lines: they agree.
func (m *Matrix) Diff(r *matrix.Report) []string {
	want := map[Key]*Line{}
	for i := range m.Lines {
		want[m.Lines[i].Key] = &m.Lines[i]
	}
	var out []string
	seen := map[Key]bool{}
	for i := range r.Connections {
		c := &r.Connections[i]
		k, got, err := read(c)
		seen[k] = true
		l := want[k]
		switch {
		case err != nil:
			out = append(out, err.Error())
		case l == nil:
			out = append(out, fmt.Sprintf("%s at %s: %s, and is not expected at all", k, c.Address, got))
		case got != l.Outcome:
			out = append(out, fmt.Sprintf("%s at %s: %s, expected %s (line %d); %s", k, c.Address, got, l.Outcome, l.Number, c.Reason.Text))
		case c.Partly != "":
			out = append(out, fmt.Sprintf("%s at %s: %s, expected for certain (line %d)", k, c.Address, c.Partly, l.Number))
		}
	}
	for i := range m.Lines {
		if l := &m.Lines[i]; !seen[l.Key] {
			out = append(out, fmt.Sprintf("%s: was not tried, expected %s (line %d)", l.Key, l.Outcome, l.Number))
		}
	}
	return out
}

// read takes from a connection of a report what the file speaks of.
func read(c *matrix.Connection) (Key, Outcome, error) {
	port, err := matrix.ParsePort(fmt.Sprintf("%d/%s", c.Port, c.Protocol))
	if err != nil {
		return Key{}, Outcome{}, fmt.Errorf("%s → %s: %w", c.From, c.To, err)
	}
	o := Outcome{Verdict: c.Verdict, Auth: Nobody, Policy: c.Reason.Policy, Rule: c.Reason.Rule}
	switch {
	case c.Authenticated: // also where the verdict is denied: that is a difference
		o.Auth = MTLS
	case c.Verdict == matrix.Allowed:
		o.Auth = Plain
	}
	return Key{From: c.From, To: c.To, Port: port, Via: c.Via}, o, nil
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func undash(s string) string {
	if s == "-" {
		return ""
	}
	return s
}
