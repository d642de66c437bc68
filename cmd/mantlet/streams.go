package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
)

// streamPatience bounds what is expected of a stream: its first answer, its end where policy denies it, another line where not.
const streamPatience = 10 * time.Second

// route is a --stream: FROM=TO:PORT.
type route struct {
	from, to string // "namespace/pod"
	port     uint16
}

// parseRoute reads "shop/api-0=shop/db-0:5432".
func parseRoute(text string) (route, error) {
	bad := func(why string) (route, error) {
		return route{}, fmt.Errorf("--stream %q: %s\n  hint: NAMESPACE/POD=NAMESPACE/POD:PORT, for example shop/api-0=shop/db-0:5432", text, why)
	}
	from, rest, ok := strings.Cut(text, "=")
	if !ok {
		return bad("no = between the two pods")
	}
	colon := strings.LastIndexByte(rest, ':')
	if colon < 0 {
		return bad("no port")
	}
	port, err := strconv.ParseUint(rest[colon+1:], 10, 16)
	if err != nil || port == 0 {
		return bad("the port is no number from 1 to 65535")
	}
	r := route{from, rest[:colon], uint16(port)}
	for _, pod := range []string{r.from, r.to} {
		if ns, name, ok := strings.Cut(pod, "/"); !ok || ns == "" || name == "" {
			return bad(fmt.Sprintf("%q is not NAMESPACE/POD", pod))
		}
	}
	if r.from == r.to {
		return bad("a pod's connection to itself is not a sidecar's business")
	}
	return r, nil
}

// checkRoutes refuses streams between pods that the manifests do not have.
func checkRoutes(routes []string, m *source.Manifests) error {
	var names []string
	for _, p := range m.Objects.Pods {
		names = append(names, p.Namespace+"/"+p.Name)
	}
	slices.Sort(names)
	for _, text := range routes {
		r, err := parseRoute(text)
		if err != nil {
			return err
		}
		for _, pod := range []string{r.from, r.to} {
			if !slices.Contains(names, pod) {
				return fmt.Errorf("--stream %s: the manifests make no pod %s\n  hint: these there are: %s", text, pod, strings.Join(names, ", "))
			}
		}
	}
	return nil
}

// streams are the long-lived connections that a watch keeps open.
type streams struct {
	s      *sandbox.Sandbox
	out    io.Writer
	routes []route
	open   map[route]*sandbox.Stream
}

func newStreams(s *sandbox.Sandbox, out io.Writer, texts []string) (*streams, error) {
	x := &streams{s: s, out: out, open: map[route]*sandbox.Stream{}}
	for _, text := range texts {
		r, err := parseRoute(text)
		if err != nil {
			return nil, err
		}
		x.routes = append(x.routes, r)
	}
	return x, nil
}

// begin opens all streams that policy allows.
func (x *streams) begin(ctx context.Context) {
	if len(x.routes) > 0 {
		fmt.Fprintln(x.out, "\nStreams, numbered lines each way without pause:")
	}
	for _, r := range x.routes {
		x.start(ctx, r)
	}
}

func (x *streams) start(ctx context.Context, r route) {
	ctx, cancel := context.WithTimeout(ctx, streamPatience)
	defer cancel()
	st, err := x.s.OpenStream(ctx, r.from, r.to, r.port)
	if err != nil {
		fmt.Fprintf(x.out, "  denied  %s → %s:%d; opened when policy allows it (%v)\n", r.from, r.to, r.port, err)
		return
	}
	x.open[r] = st
	fmt.Fprintf(x.out, "  opened  %s\n", st)
}

// report tells what an edit did to the streams, and returns how many fared otherwise than the evaluator says.
func (x *streams) report(ctx context.Context, c *sandbox.Change) (mismatches int) {
	ctx, cancel := context.WithTimeout(ctx, streamPatience)
	defer cancel()
	for _, r := range x.routes {
		st := x.open[r]
		switch {
		case st == nil:
			x.start(ctx, r)
		case x.s.Replaced(st):
			_, _ = st.Close(ctx)
			delete(x.open, r)
			fmt.Fprintf(x.out, "  ended   %s: with its pod\n", st)
			x.start(ctx, r)
		case x.s.Allowed(st):
			if err := st.Flowing(ctx); err != nil {
				fmt.Fprintf(x.out, "  MISMATCH %v, and policy allows it\n", err)
				mismatches++
				delete(x.open, r)
				continue
			}
			fmt.Fprintf(x.out, "  lives   %s: %d lines came back so far, none lost\n", st, st.Lines())
		default:
			mismatches += x.cut(ctx, st, c)
			delete(x.open, r)
		}
	}
	return mismatches
}

// cut tells of a stream that policy denies now.
func (x *streams) cut(ctx context.Context, st *sandbox.Stream, c *sandbox.Change) (mismatches int) {
	select {
	case <-st.Ended():
	case <-ctx.Done():
		fmt.Fprintf(x.out, "  MISMATCH %s lives on, and policy denies it\n", st)
		_, _ = st.Close(ctx)
		return 1
	}
	at, why := st.End()
	by, rec, err := x.s.Revocation(ctx, st)
	if err != nil {
		fmt.Fprintf(x.out, "  MISMATCH %v (%v)\n", err, why)
		return 1
	}
	fmt.Fprintf(x.out, "  cut     %s: %s after the edit reached the control plane, by the sidecar of %s, after %d lines\n      %s\n",
		st, at.Sub(c.Began).Round(10*time.Microsecond), by, st.Lines(), rec.Reason)
	return 0
}

// end closes what is still open, in good order, and returns how many lost something.
func (x *streams) end(ctx context.Context) (mismatches int) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), streamPatience)
	defer cancel()
	for _, r := range x.routes {
		st := x.open[r]
		if st == nil {
			continue
		}
		n, err := st.Close(ctx)
		if err != nil {
			fmt.Fprintf(x.out, "  MISMATCH %v\n", err)
			mismatches++
			continue
		}
		fmt.Fprintf(x.out, "  closed  %s in good order: %d lines sent, %d came back\n", st, n, st.Lines())
	}
	return mismatches
}
