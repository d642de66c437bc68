package expected

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/verdict"
)

const sample = `# flags: --external 203.0.113.0/24:8443 --port 81/TCP --external [2001:db8::/64]:443

# from     to:port                via       verdict  auth   policy            rule
shop/api-0 shop/db-0:5432         pod       allowed  mtls   shop/db-from-api  ingress[0]
  # another remark
shop/api-0 shop/db-0:9187         pod       denied   -      shop/db-from-api  -
shop/api-0 2001:db8::/64:443      external  allowed  plain  -                 -
`

func loadText(t *testing.T, text string) (*Matrix, error) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, File), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(dir)
}

func TestLoad(t *testing.T) {
	m, err := loadText(t, sample)
	if err != nil {
		t.Fatal(err)
	}
	tcp := func(n uint16) matrix.Port { return matrix.Port{Number: n, Protocol: verdict.TCP} }
	if want := []matrix.Port{tcp(81)}; !slices.Equal(m.Options.Ports, want) {
		t.Errorf("ports: %v, want %v", m.Options.Ports, want)
	}
	if want := []matrix.External{{Prefix: netip.MustParsePrefix("203.0.113.0/24"), Port: 8443, Protocol: verdict.TCP},
		{Prefix: netip.MustParsePrefix("2001:db8::/64"), Port: 443, Protocol: verdict.TCP}}; !slices.Equal(m.Options.External, want) {
		t.Errorf("external: %v, want %v", m.Options.External, want)
	}
	want := []Line{
		{4, Key{"shop/api-0", "shop/db-0", tcp(5432), matrix.ViaPod}, Outcome{matrix.Allowed, MTLS, "shop/db-from-api", "ingress[0]"}},
		{6, Key{"shop/api-0", "shop/db-0", tcp(9187), matrix.ViaPod}, Outcome{matrix.Denied, Nobody, "shop/db-from-api", ""}},
		{7, Key{"shop/api-0", "2001:db8::/64", tcp(443), matrix.ViaExternal}, Outcome{matrix.Allowed, Plain, "", ""}},
	}
	if !slices.Equal(m.Lines, want) {
		t.Errorf("lines: %v\nwant %v", m.Lines, want)
	}
}

func TestLoadRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"":                                                          "no line names a connection",
		"# only a remark\n":                                         "no line names a connection",
		"a/b c/d:80 pod allowed mtls -\n":                           "line 1: 6 words",
		"a/b c/d pod allowed mtls - -\n":                            `line 1: "c/d": want to:port`,
		"a/b c/d:0 pod allowed mtls - -\n":                          `line 1: port "0"`,
		"a/b c/d:80 node allowed mtls - -\n":                        `line 1: via "node"`,
		"a/b c/d:80 pod allowed - - -\n":                            `line 1: "allowed" "-"`,
		"a/b c/d:80 pod denied mtls - -\n":                          `line 1: "denied" "mtls"`,
		"a/b c/d:80 pod perhaps plain - -\n":                        `line 1: "perhaps" "plain"`,
		"# flags: --port\n" + sample:                                "line 1: flag --port: its value is missing",
		"# flags: --replicas 2\n" + sample:                          "line 1: flag --replicas",
		"# flags: --external nowhere\n" + sample:                    `line 1: external "nowhere"`,
		"\n# flags: --port 80\n" + sample:                           "line 2: the flags stand in the first line",
		sample + "shop/api-0 shop/db-0:5432/TCP pod denied - - -\n": "line 8: shop/api-0 → shop/db-0:5432/TCP (pod) stands in line 4 already",
	} {
		if _, err := loadText(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", text, err, want)
		}
	}
	if _, err := Load(t.TempDir()); err == nil {
		t.Error("a folder without the file: no error")
	}
}

// report is what agrees with sample, in two address families where there are two.
func report() *matrix.Report {
	reason := verdict.Reason{Policy: "shop/db-from-api", Rule: "ingress[0]"}
	c := matrix.Connection{From: "shop/api-0", To: "shop/db-0", Address: "10.64.0.7", Port: 5432, Protocol: "TCP", Via: matrix.ViaPod,
		Verdict: matrix.Allowed, Authenticated: true, Reason: reason}
	c6 := c
	c6.Address = "fd00:10:64::7"
	d := c
	d.Port, d.Verdict, d.Authenticated, d.Reason.Rule = 9187, matrix.Denied, false, ""
	e := matrix.Connection{From: "shop/api-0", To: "2001:db8::/64", Address: "2001:db8::1", Port: 443, Protocol: "TCP", Via: matrix.ViaExternal, Verdict: matrix.Allowed}
	return &matrix.Report{Connections: []matrix.Connection{c, c6, d, e}}
}

func TestDiff(t *testing.T) {
	m, err := loadText(t, sample)
	if err != nil {
		t.Fatal(err)
	}
	if got := m.Diff(report()); len(got) > 0 {
		t.Fatalf("the report agrees, and differs in:\n%s", strings.Join(got, "\n"))
	}
	for name, tc := range map[string]struct {
		change func(r *matrix.Report)
		want   []string
	}{
		"missing": {func(r *matrix.Report) { r.Connections = r.Connections[:3] }, []string{"2001:db8::/64:443/TCP (external): was not tried"}},
		"empty":   {func(r *matrix.Report) { r.Connections = nil }, []string{"line 4", "line 6", "line 7"}},
		"surplus": {func(r *matrix.Report) {
			c := r.Connections[0]
			c.From = "shop/web-0"
			r.Connections = append(r.Connections, c)
		}, []string{"shop/web-0 → shop/db-0:5432/TCP (pod) at 10.64.0.7: allowed mtls shop/db-from-api ingress[0], and is not expected at all"}},
		"other kind":    {func(r *matrix.Report) { r.Connections[3].Via = matrix.ViaService }, []string{"(service)", "was not tried"}},
		"other port":    {func(r *matrix.Report) { r.Connections[3].Port = 444 }, []string{"444", "was not tried"}},
		"other proto":   {func(r *matrix.Report) { r.Connections[3].Protocol = "UDP" }, []string{"443/UDP", "was not tried"}},
		"no proto":      {func(r *matrix.Report) { r.Connections[3].Protocol = "ICMP" }, []string{`protocol "ICMP"`, "was not tried"}},
		"one family":    {func(r *matrix.Report) { r.Connections[1].Verdict = matrix.Denied }, []string{"at fd00:10:64::7: denied mtls"}},
		"authenticated": {func(r *matrix.Report) { r.Connections[0].Authenticated = false }, []string{"at 10.64.0.7: allowed plain"}},
		"policy":        {func(r *matrix.Report) { r.Connections[2].Reason.Policy = "" }, []string{"denied - - -, expected denied - shop/db-from-api - (line 6)"}},
		"rule":          {func(r *matrix.Report) { r.Connections[2].Reason.Rule = "ingress[1]" }, []string{"ingress[1]"}},
		"partly":        {func(r *matrix.Report) { r.Connections[0].Partly = "1 of 2 endpoints" }, []string{"1 of 2 endpoints"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := report()
			tc.change(r)
			got := m.Diff(r)
			if len(got) != len(tc.want) {
				t.Fatalf("%d differences, want %d:\n%s", len(got), len(tc.want), strings.Join(got, "\n"))
			}
			for i := range got {
				if !strings.Contains(got[i], tc.want[i]) {
					t.Errorf("difference %q, want one with %q", got[i], tc.want[i])
				}
			}
		})
	}
}
