package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// report writes figures as they are asked for.
func report(format string, f figures, out io.Writer) error {
	switch format {
	case "json":
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(f)
	case "table":
		for _, t := range tables(f) {
			if err := t.plain(out); err != nil {
				return err
			}
		}
		_, err := fmt.Fprintf(out, "%d rounds, %d CPUs; load before: %s; after: %s\n", f.Rounds, f.CPUs, f.LoadBefore, f.LoadAfter)
		return err
	}
	return fmt.Errorf("-o %q: there are table and json", format)
}

// table is a title, a row of heads, and rows.
type table struct {
	title string
	rows  [][]string
}

// tables are all that there is to say: what was aimed at, the ratios, and the figures themselves.
func tables(f figures) []table {
	out := []table{aims(f)}
	for _, base := range []string{plainPair, rawTCP} {
		if t := against(f, base); len(t.rows) > 1 {
			out = append(out, t)
		}
	}
	return append(out, list(f), absolute(f))
}

func aims(f figures) table {
	t := table{"Targets", [][]string{{"", "", "target", "median (least–greatest)", ""}}}
	for _, a := range f.Targets {
		t.rows = append(t.rows, []string{titleOf(a.Metric), a.Of + " / " + a.To, a.bound(), a.String(), a.verdict()})
	}
	return t
}

// against shows every variant over one of them.
func against(f figures, base string) table {
	t := table{"Ratios to " + base, [][]string{{""}}}
	for _, v := range f.Variants {
		row := []string{v.Name}
		some := false
		for _, m := range metrics {
			r, ok := f.find(m.name, v.Name, base)
			some = some || ok
			text := ""
			if ok {
				text = fmt.Sprintf("%.2f", r.Median)
			}
			row = append(row, text)
		}
		if some {
			t.rows = append(t.rows, row)
		}
	}
	for _, m := range metrics {
		t.rows[0] = append(t.rows[0], m.title)
	}
	return withoutEmpty(t)
}

// list shows what a longer list of identities costs, of both kinds.
func list(f figures) table {
	t := table{"What a list of identities costs: ratios to the variant with one", [][]string{{"", "CPU per connection", "connections", "connect p50", "connect p99"}}}
	for _, v := range f.Variants {
		for _, base := range []string{linearOne, strictOne} {
			kind, _, _ := strings.Cut(base, "-")
			if v.Admitted <= 1 || !strings.HasPrefix(v.Name, kind+"-") {
				continue
			}
			row := []string{v.Name}
			for _, m := range []string{"cpu", "rate", "connect-p50", "connect-p99"} {
				if r, ok := f.find(m, v.Name, base); ok {
					row = append(row, r.String())
				}
			}
			if len(row) > 1 {
				t.rows = append(t.rows, row)
			}
		}
	}
	return t
}

func absolute(f figures) table {
	t := table{"Medians, for scale only", [][]string{{""}}}
	for _, m := range metrics {
		t.rows[0] = append(t.rows[0], m.title+" "+m.unit)
	}
	t.rows[0] = append(t.rows[0], "Envoys MB (private)", "agents MB (private)", "resumed %")
	for _, v := range f.Variants {
		row := []string{v.Name}
		for _, m := range metrics {
			text := ""
			if x := v.Median[m.name]; x > 0 {
				text = fmt.Sprintf("%.0f", x)
			}
			row = append(row, text)
		}
		row = append(row, v.Envoy.String(), v.Agent.String())
		text := ""
		if v.Resumed > 0 {
			text = fmt.Sprintf("%.1f", 100*v.Resumed)
		}
		t.rows = append(t.rows, append(row, text))
	}
	return withoutEmpty(t)
}

func (m memory) String() string {
	if m.Resident == 0 {
		return ""
	}
	return fmt.Sprintf("%d (%d)", m.Resident/1e6, m.Private/1e6)
}

func titleOf(metric string) string {
	for _, m := range metrics {
		if m.name == metric {
			return m.title
		}
	}
	return metric
}

// withoutEmpty leaves out the columns in which there is nothing.
func withoutEmpty(t table) table {
	out := table{t.title, make([][]string, len(t.rows))}
	for c := range t.rows[0] {
		some := c == 0
		for _, row := range t.rows[1:] {
			some = some || row[c] != ""
		}
		for r, row := range t.rows {
			if some {
				out.rows[r] = append(out.rows[r], row[c])
			}
		}
	}
	return out
}

// plain writes the table for a terminal. Columns are as wide as what is widest in them, counted in characters.
func (t table) plain(out io.Writer) error {
	width := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for c, cell := range row {
			width[c] = max(width[c], len([]rune(cell)))
		}
	}
	var b strings.Builder
	b.WriteString(t.title + "\n")
	for _, row := range t.rows {
		for c, cell := range row {
			fill := strings.Repeat(" ", width[c]-len([]rune(cell)))
			if c == 0 {
				b.WriteString(cell + fill)
			} else {
				b.WriteString("  " + fill + cell)
			}
		}
		b.WriteString("\n")
	}
	_, err := io.WriteString(out, b.String()+"\n")
	return err
}

// markdown is the table for the documentation.
func (t table) markdown() string {
	var b strings.Builder
	b.WriteString("### " + t.title + "\n\n")
	for i, row := range t.rows {
		b.WriteString("| " + strings.Join(row, " | ") + " |\n")
		if i == 0 {
			b.WriteString("| ---" + strings.Repeat(" | ---:", len(row)-1) + " |\n")
		}
	}
	return b.String()
}
