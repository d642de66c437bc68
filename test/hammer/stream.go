package hammer

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	"github.com/mantlet/mantlet/sandbox/netns"
)

const (
	streamPause = 20 * time.Millisecond
	streamPiece = 512 // bytes at a time, other ones each time
	// streamPatience bounds how long a piece is on its way there and back on a busy machine.
	streamPatience = 20 * time.Second
)

// broken is the end of a stream.
type broken struct {
	peer string
	to   Target
	// Between these times it broke: the last piece that came back, and when that was noticed.
	good, noticed time.Time
	err           error
}

// Stream has a pod keep one connection to a target open, which is always allowed, send bytes over it and hold what comes back against them,
// until Stop. When it breaks there is another one.
func (s *Siege) Stream(pod *netns.Pod, to Target) {
	s.running.Go(func() {
		good := time.Now()
		for s.ctx.Err() == nil {
			err := s.stream(pod, to, &good)
			if err == nil {
				return
			}
			s.mu.Lock()
			s.breaks = append(s.breaks, broken{pod.Name(), to, good, time.Now(), err})
			s.mu.Unlock()
			select {
			case <-time.After(streamPause):
			case <-s.ctx.Done():
			}
		}
	})
}

// stream keeps a connection until it breaks, or returns nil after Stop. good is set at each piece that came back.
func (s *Siege) stream(pod *netns.Pod, to Target, good *time.Time) error {
	var c net.Conn
	err := pod.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", to.Addr.String(), attemptPatience) //nolint:noctx // it ends by itself
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	nonce := fmt.Sprintf("n%d", nonces.Add(1))
	s.mu.Lock()
	s.streams[to.App+" "+nonce] = true
	app := s.apps[to.App]
	s.mu.Unlock()
	_ = c.SetDeadline(time.Now().Add(streamPatience))
	if _, err := fmt.Fprintf(c, "%s\n", nonce); err != nil {
		return err
	}
	in := bufio.NewReader(c)
	line, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("%d %s\n", app.port, nonce); line != want {
		return fmt.Errorf("the app answered %q", line)
	}
	random := rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%32s", nonce))))
	sent, back := make([]byte, streamPiece), make([]byte, streamPiece)
	rest := time.NewTicker(streamPause)
	defer rest.Stop()
	for {
		_, _ = random.Read(sent)
		_ = c.SetDeadline(time.Now().Add(streamPatience))
		if _, err := c.Write(sent); err != nil {
			return err
		}
		if _, err := io.ReadFull(in, back); err != nil {
			return err
		}
		if !bytes.Equal(sent, back) {
			return errors.New("what came back is not what was sent")
		}
		*good = time.Now()
		s.mu.Lock()
		s.echoed += streamPiece
		s.mu.Unlock()
		select {
		case <-rest.C:
		case <-s.ctx.Done():
			return nil
		}
	}
}

// judgeBreak adds the end of a stream to a tally.
func (s *Siege) judgeBreak(t *Tally, b *broken) {
	t.Breaks++
	if s.isExcused(b.peer, b.to.Pod, b.good, b.noticed) {
		t.Excused++
		if s.silent[b.to.App] > 0 { // it may have reached the app and no further
			s.silent[b.to.App]--
		}
		return
	}
	t.complain("the stream %s → %s (%s), which is always allowed, broke between %s and %s: %v", b.peer, b.to.Name, b.to.Addr, clock(b.good), clock(b.noticed), b.err)
}
