package hammer

import (
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
)

// Windows counts what had to become of attempts by who tried, and by how many states of policy may have been in force meanwhile: 1 is policy
// at rest, 2 is one edit, of which exactly the old and the new state are known. The more there are, the more is "either", and the less is shown.
type Windows map[string]map[int]Judged

// Judged counts attempts by what had to become of them.
type Judged struct{ Denied, Allowed, Either int }

func (j *Judged) add(o Judged) {
	j.Denied += o.Denied
	j.Allowed += o.Allowed
	j.Either += o.Either
}

// note counts attempts of a peer.
func (w *Windows) note(peer string, states int, o Judged) {
	if *w == nil {
		*w = Windows{}
	}
	if (*w)[peer] == nil {
		(*w)[peer] = map[int]Judged{}
	}
	j := (*w)[peer][states]
	j.add(o)
	(*w)[peer][states] = j
}

func (w *Windows) add(o Windows) {
	for peer, windows := range o {
		for states, j := range windows {
			w.note(peer, states, j)
		}
	}
}

// manyStates and more share a column.
const manyStates = 5

// String is a table: a row for each peer, and for each number of states how many attempts had to be denied, answered, or could be either.
func (w Windows) String() string {
	var b strings.Builder
	out := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprint(out, "denied/allowed/either while so many states may have been in force:")
	for n := 1; n < manyStates; n++ {
		fmt.Fprintf(out, "\t%d", n)
	}
	fmt.Fprintf(out, "\t%d and more\n", manyStates)
	peers := make([]string, 0, len(w))
	for peer := range w {
		peers = append(peers, peer)
	}
	slices.Sort(peers)
	for _, peer := range peers {
		var columns [manyStates]Judged
		for states, j := range w[peer] {
			columns[min(states, manyStates)-1].add(j)
		}
		fmt.Fprint(out, peer)
		for _, j := range columns {
			fmt.Fprintf(out, "\t%d/%d/%d", j.Denied, j.Allowed, j.Either)
		}
		fmt.Fprintln(out)
	}
	_ = out.Flush() // into memory
	return b.String()
}
