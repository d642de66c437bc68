package hammer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// App is a server in a pod. Of each connection it reads one line, the nonce, notes it, answers "PORT NONCE", and from then on sends back
// whatever it gets. Of each datagram it does the same, once.
type App struct {
	port      uint16
	listeners []net.Listener
	datagrams net.PacketConn
	running   sync.WaitGroup

	mu     sync.Mutex
	seen   map[string]Visit // by nonce
	silent int              // connections that ended before they said anything
	open   map[net.Conn]struct{}
	closed bool
}

// Visit is a connection that an app has seen.
type Visit struct {
	At   time.Time
	From string // the address that the app saw: its own sidecar's, where it has one
}

// NewApp starts an app on a port of a pod, on all its addresses.
func NewApp(pod *netns.Pod, port uint16) (*App, error) {
	a := &App{port: port, seen: map[string]Visit{}, open: map[net.Conn]struct{}{}}
	err := pod.Do(func() error {
		l, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port)) //nolint:noctx // one literal address
		if err != nil {
			return err
		}
		a.listeners = append(a.listeners, l)
		a.datagrams, err = net.ListenPacket("udp", fmt.Sprintf("[::]:%d", port)) //nolint:noctx // one literal address
		if err != nil {
			l.Close()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("app in %s: %w", pod.Name(), err)
	}
	for _, l := range a.listeners {
		a.running.Go(func() { a.accept(l) })
	}
	a.running.Go(a.receive)
	return a, nil
}

// receive answers datagrams until the app ends.
func (a *App) receive() {
	buf := make([]byte, 64)
	for {
		n, from, err := a.datagrams.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // of an answer that nobody took
			continue
		}
		nonce := string(buf[:n])
		a.mu.Lock()
		if _, again := a.seen[nonce]; !again {
			a.seen[nonce] = Visit{time.Now(), from.String()}
		}
		a.mu.Unlock()
		_, _ = fmt.Fprintf(answer{a.datagrams, from}, "%d %s", a.port, nonce) // what does not arrive is for the client to notice
	}
}

// answer writes datagrams to whoever sent one.
type answer struct {
	from net.PacketConn
	to   net.Addr
}

func (w answer) Write(b []byte) (int, error) { return w.from.WriteTo(b, w.to) }

func (a *App) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if !a.hold(c) {
			continue
		}
		a.running.Go(func() {
			defer a.release(c)
			a.talk(c)
		})
	}
}

func (a *App) hold(c net.Conn) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		c.Close()
		return false
	}
	a.open[c] = struct{}{}
	return true
}

func (a *App) release(c net.Conn) {
	c.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.open, c)
}

func (a *App) talk(c net.Conn) {
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		if !a.closed {
			a.silent++
		}
		return
	}
	nonce := strings.TrimSuffix(line, "\n")
	a.mu.Lock()
	a.seen[nonce] = Visit{time.Now(), c.RemoteAddr().String()}
	a.mu.Unlock()
	if _, err := fmt.Fprintf(c, "%d %s\n", a.port, nonce); err != nil {
		return
	}
	_, _ = io.Copy(struct{ io.Writer }{c}, in) // a cut is for the client to notice
}

// Take returns what came since the last call, by nonce, and how many connections said nothing.
func (a *App) Take() (seen map[string]Visit, silent int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	seen, silent = a.seen, a.silent
	a.seen, a.silent = map[string]Visit{}, 0
	return seen, silent
}

// Close ends the app and all its connections.
func (a *App) Close() {
	a.mu.Lock()
	a.closed = true
	for c := range a.open {
		c.Close()
	}
	a.mu.Unlock()
	for _, l := range a.listeners {
		l.Close()
	}
	_ = a.datagrams.Close()
	a.running.Wait()
}
