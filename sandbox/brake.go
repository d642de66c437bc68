package sandbox

import (
	"net"
	"sync"
	"time"
)

// brake holds up the connections of a server. The zero value lets everything pass at once.
type brake struct {
	mu     sync.Mutex
	delay  time.Duration // of each read
	frozen chan struct{} // closed when it thaws; nil: not frozen
}

func (b *brake) slow(delay time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.delay = delay
}

func (b *brake) freeze() (thaw func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	frozen := make(chan struct{})
	b.frozen = frozen
	return sync.OnceFunc(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		close(frozen)
		if b.frozen == frozen {
			b.frozen = nil
		}
	})
}

// wait returns when a connection may go on, or has been closed.
func (b *brake) wait(closed <-chan struct{}, delayed time.Duration) {
	b.mu.Lock()
	frozen := b.frozen
	b.mu.Unlock()
	if delayed > 0 {
		t := time.NewTimer(delayed)
		defer t.Stop()
		select {
		case <-t.C:
		case <-closed:
		}
	}
	if frozen != nil {
		select {
		case <-frozen:
		case <-closed:
		}
	}
}

func (b *brake) latency() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.delay
}

// braked is a listener whose connections obey a brake.
type braked struct {
	net.Listener
	brake *brake
}

// Accept implements net.Listener.
func (l braked) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &brakedConn{Conn: c, brake: l.brake, closed: make(chan struct{})}, nil
}

type brakedConn struct {
	net.Conn
	brake  *brake
	once   sync.Once
	closed chan struct{}
}

func (c *brakedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.brake.wait(c.closed, c.brake.latency())
	return n, err
}

func (c *brakedConn) Write(p []byte) (int, error) {
	c.brake.wait(c.closed, 0)
	return c.Conn.Write(p)
}

func (c *brakedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
