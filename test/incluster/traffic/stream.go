package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// Course is what came of the connections to one address so far, of which there is one at a time, and one in all if none breaks.
type Course struct {
	To      string        `json:"to"`
	Lines   int           `json:"lines"`   // came back as they were sent
	Slowest time.Duration `json:"slowest"` // ns, that a line took to come back
	Breaks  int           `json:"breaks"`  // of connections, or attempts at one
	// Lately are the last breaks, at most ten.
	Lately []Break `json:"lately,omitempty"`
}

// Break is the end of a connection.
type Break struct {
	At    time.Time `json:"at"`
	Lines int       `json:"lines"` // the connection had until then
	Error string    `json:"error"`
}

// Echo accepts connections at "host:port" until ctx ends, and sends back on each what comes.
func Echo(ctx context.Context, at string) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", at)
	if err != nil {
		return err
	}
	return echo(ctx, l)
}

func echo(ctx context.Context, l net.Listener) error {
	var open sync.WaitGroup
	defer open.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		open.Go(func() {
			defer conn.Close()
			defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
			_, _ = io.Copy(conn, conn) // its end is the client's to tell of
		})
	}
}

// Stream keeps one connection to each address, where Echo answers, until ctx ends: a numbered line, back, and the next one. A connection that breaks is
// tallied and made anew. It writes a Course of each as a JSON line four times a second.
func Stream(ctx context.Context, out io.Writer, addresses []string) error {
	courses := make([]Course, len(addresses))
	var mu sync.Mutex
	var all sync.WaitGroup
	defer all.Wait()
	for i, to := range addresses {
		courses[i] = Course{To: to}
		all.Go(func() {
			for again := true; again; again = every(ctx, between) {
				n, err := converse(ctx, to, func(took time.Duration) {
					mu.Lock()
					defer mu.Unlock()
					courses[i].Lines++
					courses[i].Slowest = max(courses[i].Slowest, took)
				})
				if ctx.Err() != nil { // what it says is about the end
					return
				}
				mu.Lock()
				courses[i].broke(Break{At: time.Now(), Lines: n, Error: err.Error()})
				mu.Unlock()
			}
		})
	}
	lines := json.NewEncoder(out)
	for every(ctx, telling) {
		mu.Lock()
		now := slices.Clone(courses)
		mu.Unlock()
		for _, c := range now {
			if err := lines.Encode(c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Course) broke(b Break) {
	c.Breaks++
	const most = 10
	c.Lately = slices.Concat(c.Lately[max(0, len(c.Lately)-most+1):], []Break{b}) // a course that is being written keeps its own
}

// converse has one connection until it breaks, which it says how, or ctx ends, and tells of each line that came back, and of how many in all.
func converse(ctx context.Context, to string, back func(took time.Duration)) (n int, err error) {
	conn, err := (&net.Dialer{Timeout: Patience, KeepAlive: -1}).DialContext(ctx, "tcp", to)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	for r := bufio.NewReader(conn); ; n++ {
		began := time.Now()
		if err := conn.SetDeadline(began.Add(Patience)); err != nil {
			return n, err
		}
		line := fmt.Sprintf("line %d to %s\n", n, to)
		if _, err := io.WriteString(conn, line); err != nil {
			return n, err
		}
		got, err := r.ReadString('\n')
		if err != nil {
			return n, err
		}
		if got != line {
			return n, fmt.Errorf("sent %q, and %q came back", line, got)
		}
		back(time.Since(began))
		if !every(ctx, between) {
			return n, ctx.Err()
		}
	}
}
