package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// TestStream: lines come back on one connection; one that ends, or gives back something else, is a break, and there is another one afterwards.
func TestStream(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	good, short, wrong := listen(t), listen(t), listen(t)
	parts.Go(func() {
		if err := echo(ctx, good); err != nil {
			t.Error(err)
		}
	})
	answer := func(l net.Listener, with func(conn net.Conn, line string)) {
		context.AfterFunc(ctx, func() { _ = l.Close() })
		parts.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				for r, i := bufio.NewReader(conn), 0; i < 3; i++ {
					line, err := r.ReadString('\n')
					if err != nil {
						break
					}
					with(conn, line)
				}
				conn.Close()
			}
		})
	}
	answer(short, func(conn net.Conn, line string) { _, _ = io.WriteString(conn, line) })
	answer(wrong, func(conn net.Conn, line string) { _, _ = io.WriteString(conn, "no "+line) })

	in, out := io.Pipe()
	addresses := []string{good.Addr().String(), short.Addr().String(), wrong.Addr().String()}
	parts.Go(func() {
		if err := Stream(ctx, out, addresses); err != nil {
			t.Error(err)
		}
		out.Close()
	})
	last := map[string]Course{}
	for lines := json.NewDecoder(in); last[addresses[0]].Lines < 20 || last[addresses[1]].Breaks < 2 || last[addresses[2]].Breaks < 12; {
		var c Course
		if err := lines.Decode(&c); err != nil {
			t.Fatal(err)
		}
		last[c.To] = c
	}
	if c := last[addresses[0]]; c.Breaks != 0 || c.Slowest <= 0 || c.Lately != nil {
		t.Errorf("an echo: %+v", c)
	}
	if c := last[addresses[1]]; c.Lines/3 != c.Breaks && c.Lines/3 != c.Breaks-1 || c.Lately[0].Lines != 3 {
		t.Errorf("one that ends after three lines: %+v", c)
	}
	if c := last[addresses[2]]; c.Lines != 0 || len(c.Lately) != 10 || !strings.Contains(c.Lately[0].Error, "came back") {
		t.Errorf("one that sends something else: %+v", c)
	}
	cancel()
	_, _ = io.Copy(io.Discard, in)
}
