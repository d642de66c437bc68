package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/sandbox/netns"
)

const (
	crowd   = 2000 // connections at once, all admitted
	mob     = 500  // connections at the same time, none admitted
	dialers = 8    // that many threads connect at the same time
)

// loadPatience bounds everything about one crowd on a busy machine.
const loadPatience = 60 * time.Second

// TestCrowd opens 2,000 connections between two sidecars, all at the same time, while a denied peer opens 500 to the same app; twice.
func TestCrowd(t *testing.T) {
	s := besiege(t)
	api, evil, db := pod(t, s, "shop/api"), pod(t, s, "shop/evil"), pod(t, s, "shop/db")
	late := func() int { // connections that had not sent a ClientHello in time and were taken for plaintext
		return total(sidecarOf(t, "shop/db").stats(t, `^listener\..*_15006\.downstream_pre_cx_timeout$`))
	}
	for round := range 2 {
		eachFamily(t, db, func(t *testing.T, a netip.Addr) {
			to := netip.AddrPortFrom(a, echo)
			before := accepted(t, db, echo)
			began := time.Now()
			var denied sync.WaitGroup
			denied.Go(func() {
				// Half of them by its own sidecar, which ends them there, and half past it.
				conns := append(connect(t, evil, to, mob/2, nil), connect(t, evil, to, mob/2, netfilter.Exempt)...)
				defer closeAll(conns)
				leaked, hung := 0, 0
				for _, r := range converse(conns) {
					leaked += r.bytes
					if errors.Is(r.err, os.ErrDeadlineExceeded) {
						hung++
					}
				}
				if leaked > 0 || hung > 0 {
					t.Errorf("of %d denied connections %d were left open; %d bytes came", mob, hung, leaked)
				}
				t.Logf("round %d: %d connections denied after %s", round+1, len(conns), time.Since(began).Round(time.Millisecond))
			})
			conns := connect(t, api, to, crowd, nil)
			defer closeAll(conns)
			t.Logf("round %d: %d connections opened after %s", round+1, len(conns), time.Since(began).Round(time.Millisecond))
			failed := map[string]int{}
			for _, r := range converse(conns) {
				if r.err != nil {
					failed[reason(r.err)]++
				}
			}
			t.Logf("round %d: all answered after %s", round+1, time.Since(began).Round(time.Millisecond))
			for why, n := range failed {
				t.Errorf("%d of %d connections: %s", n, crowd, why)
			}
			if still := talkAgain(conns); still != crowd {
				t.Errorf("%d of %d connections are still good when all are open", still, crowd)
			}
			denied.Wait()
			t.Logf("round %d: %d so far were taken for plaintext because they were late", round+1, late())
			if got := accepted(t, db, echo) - before; got != crowd {
				t.Errorf("the app accepted %d connections, not %d", got, crowd)
			}
		})
	}
	for _, name := range []string{"shop/api", "shop/evil", "shop/db"} {
		sc := sidecarOf(t, name)
		if sc.envoy == 0 {
			t.Fatalf("the Envoy of %s is gone", name)
		}
		await(t, "connections of "+name+" to end", func() bool {
			return total(sc.stats(t, `^listener\..*_150(01|06)\.downstream_cx_active$`)) == 0
		})
		if files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", sc.envoy)); err != nil || len(files) > 200 {
			t.Errorf("the Envoy of %s has %d open files left (%v)", name, len(files), err)
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", sc.envoy))
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "VmHWM") || strings.HasPrefix(line, "VmRSS") {
				t.Logf("the Envoy of %s: %s", name, strings.Join(strings.Fields(line), " "))
			}
		}
	}
	for _, a := range db.Spec().IPs {
		wantReached(t, probe(t, api, a, echo), "shop/db")
		wantNothing(t, probe(t, evil, a, echo))
	}
}

// connect opens connections from a pod's app as fast as it can. A refused one counts as nil.
func connect(t *testing.T, from *netns.Pod, to netip.AddrPort, n int, control func(network, address string, raw syscall.RawConn) error) []net.Conn {
	t.Helper()
	conns := make([]net.Conn, n)
	var g errgroup.Group
	for d := range dialers {
		g.Go(func() error {
			return from.Do(func() error {
				ctx, cancel := context.WithTimeout(t.Context(), loadPatience)
				defer cancel()
				for i := d; i < n; i += dialers {
					conn, err := (&net.Dialer{Control: control}).DialContext(ctx, "tcp", to.String())
					if err != nil {
						continue
					}
					_ = conn.SetDeadline(time.Now().Add(loadPatience))
					conns[i] = conn
				}
				return nil
			})
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	return conns
}

// reply is what came back on one connection.
type reply struct {
	bytes int
	err   error
}

// converse says one line on each connection, and only then reads the answers.
func converse(conns []net.Conn) []reply {
	out := make([]reply, len(conns))
	for i, c := range conns {
		if c == nil {
			out[i].err = errors.New("refused")
			continue
		}
		_, out[i].err = fmt.Fprintf(c, "line %d\n", i)
	}
	var reading sync.WaitGroup
	for i, c := range conns {
		if c == nil {
			continue
		}
		reading.Go(func() {
			line, err := bufio.NewReader(c).ReadString('\n')
			out[i].bytes, out[i].err = len(line), err
			if err == nil && !strings.Contains(line, fmt.Sprintf(`"line %d"`, i)) {
				out[i].err = errors.New("the answer is to another line")
			}
		})
	}
	reading.Wait()
	return out
}

// reason leaves the addresses out of an error: they are of one connection only.
func reason(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// talkAgain counts the connections that answer once more.
func talkAgain(conns []net.Conn) (good int) {
	for _, r := range converse(conns) {
		if r.err == nil {
			good++
		}
	}
	return good
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		if c != nil {
			_ = c.(io.Closer).Close()
		}
	}
}
